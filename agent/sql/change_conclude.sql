-- The changes of this node are committed on all of their nodes.
select multihome.conclude_schema_changes()
