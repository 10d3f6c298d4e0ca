-- Free bytes where the WAL of this node is.
select multihome.free_space() as free
