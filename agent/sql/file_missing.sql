-- Whether the server has no such file; a path that is not absolute begins at its data directory.
select pg_stat_file($1, true) is null as missing
