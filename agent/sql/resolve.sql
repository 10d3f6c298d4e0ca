-- conflict, what to keep; says what was done.
select public.stillebot_resolve($1, $2) as done
