-- Refreshes every enabled subscription without copying what is there already.
select r.subscription from multihome.refresh(false) as r (subscription)
