-- whether this is now the only writable node
select multihome.up($1)
