-- How many rows a table has, counted up to $2.
select multihome.count_rows($1, $2) as counted
