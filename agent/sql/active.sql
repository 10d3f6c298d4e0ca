-- The application's active side; {table} and {column} come from the configuration, parsed and quoted.
select {column}::text as active from {table} limit 1
