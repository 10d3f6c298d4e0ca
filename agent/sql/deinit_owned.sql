-- How many things a role owns on this server, so that it cannot be dropped; no row if there is no such role.
select (select count(*) from pg_shdepend d where d.refclassid = 'pg_authid'::regclass and d.refobjid = r.oid and d.deptype = 'o') as owned
  from pg_roles r
 where r.rolname = $1
