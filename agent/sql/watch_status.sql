-- What the extension warns of, and the transient faults that have not healed.
select coalesce(s.warnings, '{}') as warnings, coalesce(s.faults, '{}') as faults from public.stillebot_status() s
