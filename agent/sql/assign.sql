-- array of [conflict, key, columns to set]: changes the rows in that order, in one transaction that replicates. Returns how
-- many of them there were. The order is made before the function is called: a select list is evaluated last.
select count(*) filter (where s.changed) as changed
  from (select multihome.assign((o.change ->> 0)::bigint, o.change -> 1, o.change -> 2) as changed
          from (select e.change
                  from jsonb_array_elements($1::text::jsonb) with ordinality e (change, place)
                 order by e.place
                offset 0) o
        offset 0) s
