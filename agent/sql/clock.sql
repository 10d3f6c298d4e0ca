-- This server's clock, in microseconds.
select (extract(epoch from clock_timestamp()) * 1000000)::int8 as now_us
