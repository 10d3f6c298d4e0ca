-- Removes the note of a hop.
select multihome.set_hop(null)
