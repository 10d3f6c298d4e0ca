-- Skips the transaction that this conflict stopped; says what was done.
select public.stillebot_skip($1) as done
