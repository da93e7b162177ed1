-- Lets each due digest leave or holds it back: a digest costs one message of the minute, and nothing
-- but critical leaves in quiet hours. What may not leave is folded into the user's overflow or quiet
-- digest. Overflow asks last: so whatever is folded into it finds it held as well.
WITH due AS MATERIALIZED (
    SELECT o.user_id, o.id, o.channel, o.target, o.digest,
           (%(limits)s::jsonb ->> o.channel)::int AS channel_limit,
           (SELECT q.until FROM quiet_users q WHERE q.user_id = o.user_id) AS until
    FROM outbox o
    WHERE o.state = 'open' AND o.digest IS NOT NULL AND o.token_minute IS NULL AND o.available_at <= now()
    ORDER BY o.available_at
    LIMIT 500
),
asking AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.channel_limit,
           row_number() OVER (PARTITION BY d.user_id, d.channel
                              ORDER BY d.digest = 'overflow', d.digest = 'quiet', d.id) AS place
    FROM due d WHERE d.until IS NULL AND d.channel_limit > 0
),
counted AS MATERIALIZED (
    INSERT INTO rate_limits AS r (user_id, lane, target, minute, used)
    SELECT user_id, channel, %(no_target)s::uuid, date_trunc('minute', now()), count(*)
    FROM asking GROUP BY user_id, channel ORDER BY user_id, channel
    ON CONFLICT (user_id, lane, target) DO UPDATE
    SET minute = greatest(r.minute, EXCLUDED.minute),
        used = EXCLUDED.used + CASE WHEN r.minute >= EXCLUDED.minute THEN r.used ELSE 0 END
    RETURNING r.user_id, r.lane, r.minute, r.used
),
drawn AS MATERIALIZED (
    SELECT a.user_id, a.id, a.channel_limit, c.minute,
           c.used - max(a.place) OVER (PARTITION BY a.user_id, a.channel) + a.place AS number
    FROM asking a JOIN counted c ON c.user_id = a.user_id AND c.lane = a.channel
),
held AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.target, d.digest,
           CASE WHEN d.until IS NULL THEN 'overflow' ELSE 'quiet' END AS folder,
           coalesce(d.until, n.minute + interval '1 minute') AS leaves
    FROM due d
    LEFT JOIN drawn n ON n.user_id = d.user_id AND n.id = d.id
    WHERE d.until IS NOT NULL OR n.number > n.channel_limit
),
opened AS MATERIALIZED (
    INSERT INTO outbox AS o (user_id, id, channel, target, digest, available_at, provider)
    SELECT DISTINCT ON (h.user_id, h.channel, h.target, h.folder)
           h.user_id, (left(h.id::text, 15) || right(gen_random_uuid()::text, 21))::uuid, h.channel, h.target,
           h.folder, h.leaves, d.provider
    FROM held h JOIN outbox d ON d.user_id = h.user_id AND d.id = h.id
    ORDER BY h.user_id, h.channel, h.target, h.folder
    ON CONFLICT (user_id, channel, target, digest) WHERE state = 'open' AND digest IS NOT NULL
    DO UPDATE SET available_at = EXCLUDED.available_at
    RETURNING o.user_id, o.id, o.channel, o.target, o.digest
),
moved AS (
    UPDATE deliveries d
    SET message_id = o.id
    FROM held h
    JOIN opened o ON o.user_id = h.user_id AND o.channel = h.channel AND o.target = h.target
                 AND o.digest = h.folder
    WHERE d.user_id = h.user_id AND d.message_id = h.id AND d.status = 'queued' AND h.digest <> h.folder
),
folded AS (
    DELETE FROM outbox o USING held h
    WHERE o.user_id = h.user_id AND o.id = h.id AND h.digest <> h.folder
)
UPDATE outbox o
SET token_minute = coalesce(n.minute, date_trunc('minute', now()))
FROM due d
LEFT JOIN drawn n ON n.user_id = d.user_id AND n.id = d.id
WHERE o.user_id = d.user_id AND o.id = d.id AND o.state = 'open'
  AND d.until IS NULL AND (n.number IS NULL OR n.number <= n.channel_limit)
