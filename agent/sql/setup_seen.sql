-- Whether a row of another node has come.
select exists (select from multihome.probe p where p.token::text = $1) as seen
