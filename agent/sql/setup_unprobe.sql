-- Takes this node's row away again; what an earlier set-up left goes, too.
delete from multihome.probe p where p.token::text = $1 or (p.node = $2 and p.sent_at < now() - interval '1 hour')
