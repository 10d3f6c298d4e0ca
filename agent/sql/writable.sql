-- Whether this database takes writes.
select multihome.state()->>'state' = 'up' as up
