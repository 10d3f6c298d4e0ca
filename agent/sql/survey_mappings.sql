-- pg_ident.conf as the file has it now, line by line.
select jsonb_build_object(
           'file', m.file_name,
           'line', m.line_number,
           'map', m.map_name,
           'user', m.sys_name,
           'role', m.pg_username,
           'error', m.error
       )::text as survey
  from pg_ident_file_mappings() m
 order by m.map_number nulls first, m.line_number
