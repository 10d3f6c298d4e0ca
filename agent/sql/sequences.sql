-- Each sequence that gives keys: one JSON object a row
select s.sequence::text as sequence from multihome.sequences() as s (sequence)
