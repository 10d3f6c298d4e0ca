-- Sets the application's active side, if it differs; {table} and {column} come from the configuration, parsed and quoted.
update {table} set {column} = $1 where {column}::text is distinct from $1::text
