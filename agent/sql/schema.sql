-- What there is in this database, in words that can be compared.
select s.kind, s.relation, s.name, s.definition, s.place from multihome.schema() as s
