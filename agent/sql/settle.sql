-- conflict, what was done, by whom; false if it was closed already.
select multihome.settle($1, $2, $3) as settled
