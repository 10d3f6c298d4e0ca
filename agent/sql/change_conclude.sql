-- In the window of this session: the changes of this node are committed everywhere.
begin read write; select multihome.conclude_schema_changes(); commit
