-- Forgets counters that nobody will read again, and the faults of providers for whom nothing waits.
WITH idle AS (
    DELETE FROM breakers b
    WHERE (b.paused_until IS NULL OR b.paused_until < now() - interval '1 hour')
      AND NOT EXISTS (SELECT FROM outbox o
                      WHERE o.provider = b.provider AND o.state IN ('open', 'sending', 'pending'))
)
DELETE FROM rate_limits
WHERE (user_id, lane, target) IN (
    SELECT user_id, lane, target FROM rate_limits WHERE minute < now() - interval '1 day' LIMIT %(room)s::int)
