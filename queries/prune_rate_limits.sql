-- Forgets counters that nobody will read again.
DELETE FROM rate_limits
WHERE (user_id, lane, target) IN (
    SELECT user_id, lane, target FROM rate_limits WHERE minute < now() - interval '1 day' LIMIT %(room)s::int)
