-- The state of this database as the extension keeps it; `since` also in microseconds, for arithmetic with other clocks.
select s.state->>'state' as state,
       s.state->>'since' as since,
       (extract(epoch from (s.state->>'since')::timestamptz) * 1000000)::int8 as since_us,
       s.state->>'by' as by_whom,
       s.state->>'reason' as reason,
       coalesce((s.state->>'sole')::boolean, false) as sole,
       coalesce((s.state->>'rejoin')::boolean, false) as rejoin,
       nullif(s.state->'hop', 'null'::jsonb)::text as hop,
       nullif(s.state->'window', 'null'::jsonb)::text as window,
       (s.state->>'writers')::int4 as writers
  from (select multihome.state() as state) s
