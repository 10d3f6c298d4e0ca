-- As down.sql, and in the same round trip what each sequence there hands out next: final, for nobody can write any more.
select multihome.down($1, $2::float8 * interval '1 second', $3, $4::text::jsonb) as lsn,
       multihome.sequence_positions()::text as sequences
