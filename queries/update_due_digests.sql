-- Lets each due digest leave or holds it back: a digest costs one message of the minute, and nothing
-- but critical leaves in quiet hours. What may not leave is folded into the user's quiet or overflow
-- digest; overflow holds a token of its minute from the start, so it is never held back again.
WITH due AS MATERIALIZED (
    SELECT o.user_id, o.id, o.channel, o.target, o.digest, o.provider, o.xmin AS version,
           (%(limits)s::jsonb ->> o.channel)::int AS channel_limit,
           CASE WHEN NOT o.critical THEN
               (SELECT q.until FROM quiet_users q WHERE q.user_id = o.user_id) END AS until
    FROM outbox o
    WHERE o.state = 'open' AND o.digest IS NOT NULL AND o.token_minute IS NULL AND o.available_at <= now()
    ORDER BY o.available_at
    LIMIT 500
    FOR UPDATE SKIP LOCKED
),
-- What joined a digest since this statement began cannot be seen here and would be lost: next time.
ready AS MATERIALIZED (
    SELECT d.* FROM due d
    WHERE d.version = (SELECT seen.xmin FROM outbox seen WHERE seen.user_id = d.user_id AND seen.id = d.id)
),
-- Those that may leave if there is a token; nobody asks for one in quiet hours. What still waits of earlier
-- minutes counts like what leaves in this one, as in create_notifications.
asking AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.channel_limit,
           row_number() OVER (PARTITION BY d.user_id, d.channel ORDER BY d.digest = 'quiet', d.id) AS place,
           (SELECT count(*) FROM (
                SELECT FROM outbox o
                WHERE o.user_id = d.user_id AND o.channel = d.channel AND o.target = d.target
                  AND o.state IN ('open', 'pending') AND NOT o.critical
                  AND o.token_minute < date_trunc('minute', now())
                ORDER BY o.id  -- as there: in the order of the index
                LIMIT d.channel_limit) early) AS waiting
    FROM ready d WHERE d.until IS NULL AND d.channel_limit > 0
),
-- As in create_notifications: a minute begins with what waits and with the digests of one that overflowed.
counted AS MATERIALIZED (
    INSERT INTO rate_limits AS r (user_id, lane, target, minute, used)
    SELECT user_id, channel, %(no_target)s::uuid, date_trunc('minute', now()), count(*)
    FROM asking GROUP BY user_id, channel ORDER BY user_id, channel
    ON CONFLICT (user_id, lane, target) DO UPDATE
    SET minute = greatest(r.minute, EXCLUDED.minute),
        used = EXCLUDED.used + CASE
            WHEN r.minute >= EXCLUDED.minute THEN r.used
            ELSE (SELECT min(a.waiting) FROM asking a WHERE a.user_id = r.user_id AND a.channel = r.lane)
                 + CASE WHEN r.minute = EXCLUDED.minute - interval '1 minute'
                        THEN greatest(0, least(r.used - (%(limits)s::jsonb ->> r.lane)::int,
                                               CASE WHEN r.lane = 'email' THEN 1 ELSE
                                                   (SELECT count(*) FROM push_subscriptions s
                                                    WHERE s.user_id = r.user_id) END))
                        ELSE 0 END
            END
    RETURNING r.user_id, r.lane, r.minute, r.used
),
-- The number each one drew of its user's minute.
drawn AS MATERIALIZED (
    SELECT a.user_id, a.id, a.channel_limit, c.minute,
           c.used - max(a.place) OVER lane + a.place + a.waiting - min(a.waiting) OVER lane AS number
    FROM asking a JOIN counted c ON c.user_id = a.user_id AND c.lane = a.channel
    WINDOW lane AS (PARTITION BY a.user_id, a.channel)
),
-- What may not leave now, where it collects instead and until when.
held AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.target, d.digest, d.provider,
           CASE WHEN d.until IS NULL THEN 'overflow' ELSE 'quiet' END AS folder,
           coalesce(d.until, n.minute + interval '1 minute') AS leaves
    FROM ready d
    LEFT JOIN drawn n ON n.user_id = d.user_id AND n.id = d.id
    WHERE d.until IS NOT NULL OR n.number > n.channel_limit
),
-- The digest it is folded into: an open one, or a new one.
opened AS MATERIALIZED (
    INSERT INTO outbox AS o (user_id, id, channel, target, digest, available_at, token_minute, provider)
    SELECT DISTINCT ON (user_id, channel, target, folder)
           user_id, (left(id::text, 15) || right(gen_random_uuid()::text, 21))::uuid, channel, target,
           folder, leaves, CASE folder WHEN 'overflow' THEN leaves END, provider
    FROM held
    ORDER BY user_id, channel, target, folder
    -- A quiet digest that is itself held goes on to the end of the new quiet hours, and an overflow digest
    -- that lost its token to a night gets that of the next minute.
    ON CONFLICT (user_id, channel, target, digest) WHERE state = 'open' AND digest IS NOT NULL
    DO UPDATE SET available_at = CASE WHEN o.digest = 'quiet' OR o.token_minute IS NULL
                                      THEN EXCLUDED.available_at ELSE o.available_at END,
                  token_minute = coalesce(o.token_minute, EXCLUDED.token_minute)
    RETURNING o.user_id, o.id, o.channel, o.target, o.digest
),
-- Its items change over,
moved AS (
    UPDATE deliveries d
    SET message_id = o.id
    FROM held h
    JOIN opened o ON o.user_id = h.user_id AND o.channel = h.channel AND o.target = h.target
                 AND o.digest = h.folder
    WHERE d.user_id = h.user_id AND d.message_id = h.id AND h.id <> o.id
),
-- and the message they leave was never tried, so nobody will miss it.
folded AS (
    DELETE FROM outbox o
    USING held h
    JOIN opened n ON n.user_id = h.user_id AND n.channel = h.channel AND n.target = h.target
                 AND n.digest = h.folder
    WHERE o.user_id = h.user_id AND o.id = h.id AND h.id <> n.id
)
UPDATE outbox o
SET token_minute = coalesce(n.minute, date_trunc('minute', now()))
FROM ready d
LEFT JOIN drawn n ON n.user_id = d.user_id AND n.id = d.id
WHERE o.user_id = d.user_id AND o.id = d.id AND o.state = 'open'
  AND d.until IS NULL AND (n.number IS NULL OR n.number <= n.channel_limit)
