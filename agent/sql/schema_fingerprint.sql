-- The same on two nodes exactly if their schemas are; none from an extension that is older, or where the agent may not ask.
select multihome.schema_fingerprint() as fingerprint
