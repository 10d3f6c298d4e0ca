-- conflict, what a person should know; it stays open.
select multihome.note($1, $2)
