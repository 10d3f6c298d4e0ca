-- JSON array of what hop_close.sql said of the sequences of other nodes
select multihome.advance_sequences($1::text::jsonb) as moved
