-- Gives due messages a token of this minute, without which none is claimed, or holds them back: what leaves costs one
-- message of its minute, and nothing but critical leaves in quiet hours. What was never tried folds into the quiet or
-- overflow digest; what was tried keeps its identity and waits, as webhooks do. Returns how many asked.
WITH giver AS MATERIALIZED (
    -- One process at a time: two would wait for each other.
    SELECT pg_try_advisory_xact_lock(hashtext('bellhop tokens')) AS alone
),
-- What is due and has no token of this minute, but not of a paused provider, and nobody's backlog before all others.
due AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.target, d.digest, d.critical, d.provider, d.version,
           d.state = 'open' AND d.channel <> 'webhook' AS folds,
           (%(limits)s::jsonb ->> d.channel)::int AS usual,
           CASE WHEN d.channel <> 'webhook' AND NOT d.critical THEN
               (SELECT q.until FROM quiet_users q WHERE q.user_id = d.user_id) END AS until
    FROM giver
    JOIN awaited_providers a ON giver.alone
    CROSS JOIN LATERAL (
        SELECT o.user_id, o.id, o.channel, o.target, o.digest, o.critical, o.provider, o.state, o.xmin AS version
        FROM outbox o
        WHERE o.provider = a.name AND o.state IN ('open', 'pending') AND o.available_at <= now()
          AND coalesce(o.token_minute, '-infinity') < date_trunc('minute', now())
        ORDER BY coalesce(o.token_minute, '-infinity'), o.available_at
        LIMIT 100
        FOR UPDATE SKIP LOCKED
    ) d
    WHERE a.paused_until IS NULL OR a.paused_until <= now()
    LIMIT 1000
),
-- What joined a digest since this statement began cannot be seen here and would be lost: next time.
ready AS MATERIALIZED (
    SELECT d.* FROM due d
    WHERE d.digest IS NULL
       OR d.version = (SELECT seen.xmin FROM outbox seen WHERE seen.user_id = d.user_id AND seen.id = d.id)
),
-- Those that may leave if there is a token, and the lane of each, as in create_notifications; nobody asks for one in
-- quiet hours. First what cannot fold, then what others fold into. A retry finds room beside the overflow digests,
-- however low the limit.
asking AS MATERIALIZED (
    SELECT d.user_id, d.id, d.digest, lane.*,
           CASE WHEN d.critical THEN 30 WHEN d.folds OR d.channel = 'webhook' THEN d.usual
                ELSE greatest(d.usual, 1 + CASE d.channel WHEN 'email' THEN 1 ELSE
                         (SELECT count(*) FROM push_subscriptions s WHERE s.user_id = d.user_id) END) END AS channel_limit,
           row_number() OVER (PARTITION BY lane.owner, lane.lane, lane.target
                              ORDER BY d.folds, d.digest IS DISTINCT FROM 'overflow', d.id) AS place
    FROM ready d
    CROSS JOIN LATERAL (
        SELECT CASE WHEN d.channel = 'webhook' AND NOT d.critical THEN '' ELSE d.user_id END AS owner,
               CASE WHEN d.critical THEN d.channel || ' critical' ELSE d.channel END AS lane,
               CASE WHEN d.channel = 'webhook' AND NOT d.critical THEN d.target ELSE %(no_target)s::uuid END AS target
    ) lane
    WHERE d.until IS NULL AND d.usual > 0
),
-- As in create_notifications.
counted AS MATERIALIZED (
    INSERT INTO rate_limits AS r (user_id, lane, target, minute, used)
    SELECT owner, lane, target, date_trunc('minute', now()), count(*)
    FROM asking GROUP BY owner, lane, target ORDER BY owner, lane, target
    ON CONFLICT (user_id, lane, target) DO UPDATE
    SET minute = greatest(r.minute, EXCLUDED.minute),
        used = EXCLUDED.used + CASE
            WHEN r.minute >= EXCLUDED.minute THEN r.used
            WHEN r.lane LIKE 'webhook%%'
            THEN greatest(0, r.used - coalesce((%(limits)s::jsonb ->> r.lane)::int, 30)
                             * (extract(epoch FROM EXCLUDED.minute - r.minute) / 60)::int)
            WHEN r.minute = EXCLUDED.minute - interval '1 minute'
            THEN greatest(0, least(r.used - coalesce((%(limits)s::jsonb ->> r.lane)::int, 30),
                                   CASE WHEN r.lane LIKE 'email%%' THEN 1 ELSE
                                       (SELECT count(*) FROM push_subscriptions s WHERE s.user_id = r.user_id) END))
            ELSE 0 END
    RETURNING r.user_id, r.lane, r.target, r.minute, r.used
),
-- The number each one drew, and the minute of which it is: up to the limit this one.
drawn AS MATERIALIZED (
    SELECT n.user_id, n.id, n.number <= n.channel_limit OR n.digest IS NOT DISTINCT FROM 'overflow' AS leaves, n.minute,
           n.minute + ((n.number - 1) / n.channel_limit) * interval '1 minute' AS slot
    FROM (
        SELECT a.user_id, a.id, a.digest, a.channel_limit, c.minute,
               c.used - max(a.place) OVER lane + a.place AS number
        FROM asking a
        JOIN counted c ON c.user_id = a.owner AND c.lane = a.lane AND c.target = a.target
        WINDOW lane AS (PARTITION BY a.owner, a.lane, a.target)
    ) n
),
-- What becomes of each: it leaves with a token (for ever, where there is no limit), or where it folds, and until when
-- it is held. An overflow digest has its place in the line since its minute began: counted, but not held back again.
decided AS MATERIALIZED (
    SELECT r.user_id, r.id, r.channel, r.target, r.critical, r.provider,
           CASE WHEN n.leaves OR r.until IS NULL AND n.id IS NULL THEN coalesce(n.minute, 'infinity')
                WHEN r.channel = 'webhook' THEN n.slot END AS token_minute,
           CASE WHEN NOT r.folds THEN NULL
                WHEN r.until IS NOT NULL THEN 'quiet'
                WHEN NOT n.leaves THEN 'overflow' END AS folder,
           CASE WHEN NOT n.leaves AND r.channel = 'webhook' THEN n.slot
                WHEN NOT n.leaves THEN n.minute + interval '1 minute'
                ELSE r.until END AS held_until
    FROM ready r
    LEFT JOIN drawn n ON n.user_id = r.user_id AND n.id = r.id
),
-- The digest that what folds is folded into: an open one, or a new one. A quiet digest that is itself held goes on to
-- the end of the new quiet hours.
opened AS MATERIALIZED (
    INSERT INTO outbox AS o (user_id, id, channel, target, digest, critical, available_at, token_minute, provider)
    SELECT DISTINCT ON (user_id, channel, target, folder)
           user_id, (left(id::text, 15) || right(gen_random_uuid()::text, 21))::uuid, channel, target,
           folder, critical, held_until, CASE folder WHEN 'overflow' THEN held_until END, provider
    FROM decided WHERE folder IS NOT NULL
    ORDER BY user_id, channel, target, folder, critical DESC
    ON CONFLICT (user_id, channel, target, digest) WHERE state = 'open' AND digest IS NOT NULL
    DO UPDATE SET critical = o.critical OR EXCLUDED.critical,
                  available_at = CASE o.digest WHEN 'quiet' THEN EXCLUDED.available_at ELSE o.available_at END
    RETURNING o.user_id, o.id, o.channel, o.target, o.digest
),
-- Its items change over,
moved AS (
    UPDATE deliveries v
    SET message_id = o.id
    FROM decided d
    JOIN opened o ON o.user_id = d.user_id AND o.channel = d.channel AND o.target = d.target AND o.digest = d.folder
    WHERE d.id <> o.id AND v.user_id = d.user_id AND v.message_id = d.id
),
-- and the message they leave was never tried, so nobody will miss it.
folded AS (
    DELETE FROM outbox o
    USING decided d
    JOIN opened n ON n.user_id = d.user_id AND n.channel = d.channel AND n.target = d.target AND n.digest = d.folder
    WHERE d.id <> n.id AND o.user_id = d.user_id AND o.id = d.id
),
-- The others leave, or wait by themselves; what something was just folded into asks once more.
settled AS (
    UPDATE outbox o
    SET token_minute = d.token_minute, available_at = coalesce(d.held_until, o.available_at)
    FROM decided d
    WHERE o.user_id = d.user_id AND o.id = d.id AND d.folder IS NULL
      AND NOT EXISTS (SELECT FROM opened n WHERE n.user_id = o.user_id AND n.id = o.id)
)
SELECT count(*) AS asked FROM ready
