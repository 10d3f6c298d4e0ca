-- reason, timeout in seconds, terminate, note of the hop as JSON text or null
select multihome.down($1, $2::float8 * interval '1 second', $3, $4::text::jsonb) as lsn
