-- Has a table copied from the publisher of a subscription; it must be empty here, or its rows give way ($3).
select multihome.copy_table($1, $2, $3)
