-- Who the node says it is; null if nobody has told it yet.
select multihome.identity()::text as survey
