-- The same on two nodes exactly if their schemas are. See schema_tells.sql.
select multihome.schema_fingerprint() as fingerprint
