-- What GET /metrics tells beside its counters, a row for each value: the gauge, its labels, the value.
SELECT 'deliveries' AS gauge, ARRAY[channel, status, coalesce(reason, '')] AS labels, count(*)::float8 AS value
FROM deliveries GROUP BY channel, status, reason
UNION ALL
SELECT 'breaker_open', ARRAY[provider], coalesce(paused_until > now() - interval '1 minute', false)::int
FROM breakers  -- while messages wait, a probe renews the pause twice a minute
UNION ALL
SELECT 'pool', ARRAY[p.what], coalesce((%(pool)s::jsonb ->> p.what)::float8, 0)
FROM unnest(ARRAY['pool_size', 'pool_available', 'requests_waiting']) AS p (what)
UNION ALL
SELECT 'oldest_due_seconds', '{}', coalesce(extract(epoch FROM now() - min(available_at)), 0)
FROM outbox WHERE state IN ('open', 'pending', 'sending') AND available_at <= now()
