-- What the failing transaction did, in its order, as far as this node has seen it.
select to_jsonb(c)::text as change from multihome.conflict_changes($1) c order by c.change_number
