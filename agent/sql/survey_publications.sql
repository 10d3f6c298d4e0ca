-- The publications of this database.
select jsonb_build_object(
           'name', p.pubname,
           'all_tables', p.puballtables,
           'inserts', p.pubinsert,
           'updates', p.pubupdate,
           'deletes', p.pubdelete,
           'truncates', p.pubtruncate
       )::text as survey
  from pg_publication p
 order by p.pubname
