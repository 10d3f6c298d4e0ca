-- The settings of these names, and all that wait for a restart. A role without pg_read_all_settings sees not all of them.
select jsonb_build_object(
           'name', s.name,
           'value', s.setting,
           'on_command_line', s.source = 'command line',
           'altered', coalesce(s.sourcefile like '%/postgresql.auto.conf', false),
           'restart', s.context = 'postmaster',
           'pending', s.pending_restart
       )::text as survey
  from pg_settings s
 where s.name = any ($1)
    or s.pending_restart
 order by s.name
