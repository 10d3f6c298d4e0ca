-- pg_hba.conf as the file has it now, line by line.
select jsonb_build_object(
           'file', r.file_name,
           'line', r.line_number,
           'kind', r.type,
           'databases', r.database,
           'users', r.user_name,
           'address', r.address,
           'netmask', r.netmask,
           'method', r.auth_method,
           'options', coalesce(r.options, '{}'),
           'error', r.error
       )::text as survey
  from pg_hba_file_rules() r
 order by r.rule_number nulls first, r.line_number
