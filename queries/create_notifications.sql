-- Stores a JSON array of notifications and decides all that is known at creation: duplicates,
-- channels, reasons, rate limits, digests. One row per item, in input order; a repeated key gives
-- the first notification with inserted = false, a user without in-app gives NULLs.
WITH item AS MATERIALIZED (
    -- What many are told stands in the first of them; the others say how far it is back.
    -- ref names the row an item asks for: its key, or itself. The key is the caller's, or made of the resource,
    -- as a hash where it is long: an index entry holds 2,700 bytes, the user's id among them.
    SELECT i.n, (i.item ->> 'id')::uuid AS id, (i.item ->> 'intake')::uuid AS intake,
           i.item ->> 'user_id' AS user_id, a.asked ->> 'event_name' AS event_name, a.asked ->> 'title' AS title,
           a.asked ->> 'body' AS body, a.asked ->> 'summary' AS summary, a.asked ->> 'target_url' AS target_url,
           coalesce(a.asked ->> 'severity', 'info') AS severity, coalesce(a.asked -> 'data', '{}') AS data,
           a.asked ->> 'batch_key' AS batch_key, a.asked ->> 'subject_key' AS subject_key,
           coalesce((a.asked ->> 'private')::boolean, false) AS private, (i.item ->> 'redacted')::boolean AS redacted,
           i.item ? 'brief' AS brief, k.key, coalesce('key ' || k.key, (i.item ->> 'id')::uuid::text) AS ref
    FROM jsonb_array_elements(%(items)s::jsonb) WITH ORDINALITY AS i (item, n)
    CROSS JOIN LATERAL (
        SELECT CASE WHEN i.item ? 'brief' AND jsonb_typeof(i.item -> 'asked') = 'number'
               THEN %(items)s::jsonb -> (i.n - 1 - (i.item ->> 'asked')::int)::int -> 'asked'
               ELSE i.item -> 'asked' END AS asked
        OFFSET 0
    ) a
    CROSS JOIN LATERAL (
        SELECT coalesce(i.item ->> 'key',
                        CASE WHEN octet_length(made.key) > 1500
                             THEN encode(sha256(convert_to(made.key, 'UTF8')), 'hex') ELSE made.key END) AS key
        FROM (SELECT (i.item ->> 'user_id') || ':' || (a.asked ->> 'event_name')
                     || ':' || (a.asked ->> 'resource_id')) AS made (key)
    ) k
),
-- What was kept for later leaves intake here and nowhere else: it is stored once or was cancelled.
due AS MATERIALIZED (
    DELETE FROM intake
    WHERE due_at <= now() AND id IN (SELECT i.intake FROM item i WHERE i.intake IS NOT NULL) RETURNING id
),
-- One key twice in a batch is one row. Sorted, so that two batches cannot deadlock.
wanted AS MATERIALIZED (
    SELECT DISTINCT ON (i.user_id, i.ref) i.*
    FROM item i
    LEFT JOIN notification_preferences p ON p.user_id = i.user_id
    WHERE coalesce(p.in_app_enabled, true) AND (i.intake IS NULL OR i.intake IN (SELECT d.id FROM due d))
    ORDER BY i.user_id, i.ref, i.n
),
-- The empty-handed update returns the row of an earlier key, and waits for one not yet committed.
stored AS MATERIALIZED (
    INSERT INTO notifications (user_id, id, event_name, title, body, summary, target_url, severity,
                               data, idempotency_key, batch_key, subject_key, private)
    SELECT user_id, id, event_name, title, body, summary, target_url, severity,
           data, key, batch_key, subject_key, private OR redacted
    FROM wanted ORDER BY user_id, ref
    ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
    DO UPDATE SET idempotency_key = EXCLUDED.idempotency_key
    RETURNING *, coalesce('key ' || idempotency_key, id::text) AS ref
),
-- Inserted means: the id that came back is the one minted for this item.
fresh AS MATERIALIZED (
    SELECT w.n, w.user_id, w.id, w.event_name, w.severity, w.batch_key, w.redacted,
           array_position('{info,success,warning,critical}', w.severity) AS rank
    FROM wanted w
    WHERE (w.user_id, w.id) IN (SELECT s.user_id, s.id FROM stored s)
),
-- Every channel the user switched on, and every webhook that listens: one row a target.
considered AS (
    SELECT f.*, c.channel, c.target, c.address, c.provider, p.min_severity, p.digest_minutes, p.events
    FROM fresh f
    JOIN notification_preferences p ON p.user_id = f.user_id
    CROSS JOIN LATERAL (
        SELECT 'email' AS channel, %(no_target)s::uuid AS target, p.email AS address, 'email' AS provider
        WHERE p.email_enabled
        UNION ALL
        SELECT 'push', coalesce(s.id, %(no_target)s::uuid), s.endpoint, 'push:' || s.host
        FROM (VALUES (p.user_id)) AS reader (id)
        LEFT JOIN push_subscriptions s ON s.user_id = reader.id
        WHERE p.push_enabled
    ) c
    UNION ALL
    SELECT f.*, 'webhook', w.id, w.url, 'webhook:' || w.host, w.min_severity, 0, p.events
    FROM fresh f
    LEFT JOIN notification_preferences p ON p.user_id = f.user_id
    JOIN webhook_endpoints w ON w.disabled_at IS NULL AND coalesce(w.user_id, f.user_id) = f.user_id
    WHERE f.rank >= array_position('{info,success,warning,critical}', w.min_severity)
      AND EXISTS (SELECT FROM unnest(w.events) AS e (pattern)
                  WHERE e.pattern IN (f.event_name, '*')
                     OR e.pattern LIKE '%%.*' AND starts_with(f.event_name, left(e.pattern, -1)))
),
-- The way a delivery goes, or the reason why it does not; ids are time-ordered like their item's.
judged AS MATERIALIZED (
    SELECT c.*, quiet.until,
           (left(c.id::text, 15) || right(gen_random_uuid()::text, 21))::uuid AS delivery_id,
           (left(c.id::text, 15) || right(gen_random_uuid()::text, 21))::uuid AS message_id,
           CASE WHEN c.rank < array_position('{info,success,warning,critical}', c.min_severity)
                THEN 'below_severity'
                WHEN NOT coalesce(switch.enabled, true) THEN 'preference_off'
                WHEN c.address IS NULL OR x.reason = 'bounced' THEN 'no_address'
                WHEN x.reason = 'unsubscribed' THEN 'unsubscribed' END AS reason,
           CASE WHEN c.severity = 'critical' THEN 'critical'
                WHEN c.channel = 'webhook' THEN 'slot'
                WHEN quiet.until IS NOT NULL THEN 'quiet'
                WHEN c.channel = 'email' AND c.batch_key IS NOT NULL AND c.digest_minutes > 0 THEN 'batch'
                ELSE 'now' END AS way
    FROM considered c
    LEFT JOIN LATERAL (
        SELECT (e.channels ->> c.channel)::boolean AS enabled
        FROM jsonb_each(c.events) AS e (pattern, channels)
        WHERE e.channels ? c.channel
          AND (e.pattern IN (c.event_name, '*')
               OR e.pattern LIKE '%%.*' AND starts_with(c.event_name, left(e.pattern, -1)))
        ORDER BY e.pattern = c.event_name DESC, length(e.pattern) DESC LIMIT 1
    ) switch ON true
    LEFT JOIN LATERAL (
        SELECT s.reason FROM suppressions s
        WHERE s.user_id = c.user_id AND s.channel = c.channel
          AND (s.reason = 'unsubscribed' OR s.hits >= 2 AND s.address = c.address)
        ORDER BY s.reason LIMIT 1
    ) x ON true
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.channel <> 'webhook' THEN
                   (SELECT q.until FROM quiet_users q WHERE q.user_id = c.user_id) END AS until
    ) quiet
),
-- What asks for a token now: its lane, the lane's limit, and its place among the lane's new ones.
asking AS MATERIALIZED (
    SELECT j.delivery_id, lane.*, CASE WHEN j.way = 'critical' THEN 30 ELSE lane.usual END AS channel_limit,
           row_number() OVER (PARTITION BY lane.owner, lane.lane, lane.target ORDER BY j.n) AS place
    FROM judged j
    CROSS JOIN LATERAL (
        SELECT CASE WHEN j.way = 'slot' THEN '' ELSE j.user_id END AS owner,
               CASE WHEN j.way = 'critical' THEN j.channel || ' critical' ELSE j.channel END AS lane,
               CASE WHEN j.way = 'slot' THEN j.target ELSE %(no_target)s::uuid END AS target,
               (%(limits)s::jsonb ->> j.channel)::int AS usual
    ) lane
    WHERE j.reason IS NULL AND j.way IN ('now', 'critical', 'slot') AND lane.usual > 0
),
-- A webhook's counter carries over what was promised to later minutes. The others start anew, after a minute that
-- overflowed with the digests that leave then (each browser has one).
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
-- The number each one drew, and the minute of which it is: up to the limit this one. FULL JOIN, here and below, because
-- every row of its right side stems from the left: it cannot be a nested loop, which the planner, who expects two
-- rows of any step, would choose for a batch of thousands as well.
drawn AS MATERIALIZED (
    SELECT n.delivery_id, n.channel_limit, n.number, n.minute,
           n.minute + ((n.number - 1) / n.channel_limit) * interval '1 minute' AS slot
    FROM (
        SELECT a.delivery_id, a.channel_limit, c.minute, c.used - max(a.place) OVER lane + a.place AS number
        FROM asking a
        FULL JOIN counted c ON c.user_id = a.owner AND c.lane = a.lane AND c.target = a.target
        WINDOW lane AS (PARTITION BY a.owner, a.lane, a.target)
    ) n
),
-- Where each one collects (nowhere: it leaves alone), when it leaves, and the minute of its token; a digest that
-- comes due asks for one then.
timed AS MATERIALIZED (
    SELECT j.*, folder.digest,
           CASE WHEN folder.digest = 'overflow' THEN d.minute + interval '1 minute'
                WHEN folder.digest IS NULL THEN coalesce(d.slot, 'infinity') END AS token_minute,
           CASE WHEN folder.digest = 'quiet' THEN j.until
                WHEN folder.digest = 'overflow' THEN d.minute + interval '1 minute'
                WHEN folder.digest IS NOT NULL THEN now() + j.digest_minutes * interval '1 minute'
                WHEN d.number > d.channel_limit THEN d.slot
                ELSE now() END AS available_at
    FROM judged j
    FULL JOIN drawn d ON d.delivery_id = j.delivery_id
    CROSS JOIN LATERAL (
        SELECT CASE WHEN j.way = 'quiet' THEN 'quiet'
                    WHEN j.way = 'batch' THEN 'key:' || j.batch_key
                    WHEN j.channel <> 'webhook' AND d.number > d.channel_limit THEN 'overflow'
               END AS digest
    ) folder
    WHERE j.reason IS NULL
),
-- The partial unique index is the window: the first item opens it, the rest join, a claim closes it.
opened AS MATERIALIZED (
    INSERT INTO outbox AS o (user_id, id, channel, target, digest, critical, available_at, token_minute,
                             provider)
    SELECT user_id, message_id, channel, target, digest, way = 'critical', available_at, token_minute, provider
    FROM (
        SELECT DISTINCT ON (user_id, channel, target, digest, CASE WHEN digest IS NULL THEN message_id END)
               timed.user_id, timed.message_id, timed.channel, timed.target, timed.digest, timed.severity,
               timed.available_at, timed.token_minute, timed.provider, timed.way, timed.n
        FROM timed
        ORDER BY user_id, channel, target, digest, CASE WHEN digest IS NULL THEN message_id END,
                 way = 'critical' DESC, n
    ) first_of_message
    ORDER BY user_id, channel, target, digest, n
    ON CONFLICT (user_id, channel, target, digest) WHERE state = 'open' AND digest IS NOT NULL
    DO UPDATE SET critical = o.critical OR EXCLUDED.critical  -- a claim sees by this write that it grew
    RETURNING o.user_id, o.id, o.channel, o.target, o.digest, o.available_at
),
-- Each delivery with its message, or with the reason why there is none.
queued AS (
    SELECT t.n, t.user_id, t.id, t.channel, t.target, t.delivery_id, o.id AS message_id, t.redacted,
           NULL AS reason, o.available_at
    FROM timed t
    FULL JOIN opened o ON o.user_id = t.user_id AND o.channel = t.channel AND o.target = t.target
                      AND coalesce(o.digest, o.id::text) = coalesce(t.digest, t.message_id::text)
    UNION ALL
    SELECT n, user_id, id, channel, target, delivery_id, NULL, redacted, reason, NULL
    FROM judged WHERE reason IS NOT NULL
),
-- The record: every channel and target that was considered.
delivered AS (
    INSERT INTO deliveries (user_id, notification_id, channel, target, id, message_id, status, reason, redacted)
    SELECT user_id, id, channel, target, delivery_id, message_id,
           CASE WHEN reason IS NULL THEN 'queued' ELSE 'suppressed' END, reason, redacted
    FROM queued
),
-- The same for the caller; leaves: something of it is due outside now.
told AS (
    SELECT n, json_agg(json_build_object('channel', channel,
                                         'status', CASE WHEN reason IS NULL THEN 'queued' ELSE 'suppressed' END,
                                         'reason', reason, 'available_at', available_at,
                                         'redacted', redacted) ORDER BY channel) AS deliveries,
           bool_or(available_at <= now()) AS leaves
    FROM queued GROUP BY n
)
SELECT i.user_id, f.n IS NOT NULL AS inserted,
       CASE WHEN i.brief THEN json_build_object('user_id', i.user_id, 'id', s.id, 'inserted', f.n IS NOT NULL)
            ELSE json_build_object('notification', n.notification,
                                   'deliveries', coalesce(told.deliveries, '[]'::json)) END AS answer,
       coalesce(told.leaves, false) AS leaves
FROM item i
LEFT JOIN stored s ON s.user_id = i.user_id AND s.ref = i.ref
LEFT JOIN fresh f ON f.n = i.n  -- not a second mention of the same item
LEFT JOIN told ON told.n = i.n AND s.id = i.id
LEFT JOIN LATERAL (
    SELECT to_json(shown) AS notification
    FROM (SELECT s.id, s.user_id, s.event_name, s.title, s.body, s.summary, s.target_url, s.severity,
                 s.data, s.idempotency_key, s.batch_key, s.subject_key, s.read_at, s.archived_at,
                 s.created_at, s.updated_at, s.id = i.id AS inserted) AS shown
    WHERE s.id IS NOT NULL AND NOT i.brief
) n ON true
ORDER BY i.n
