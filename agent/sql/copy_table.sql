-- Has a table copied from the publisher of a subscription; it must be empty here.
select multihome.copy_table($1, $2)
