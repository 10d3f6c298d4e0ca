-- Writes a row that is to be seen on the other nodes. $1: this node.
insert into multihome.probe (token, node) values (gen_random_uuid(), $1) returning token::text
