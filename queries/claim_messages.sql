-- Claims due messages for the length of a lease, each provider up to its share, and looks at every
-- item again: what was read or switched off since is suppressed, a message without items is void.
-- Returns what is to be sent now, with at most ten lines each. claim_seq is the fence.
WITH RECURSIVE provider AS (
    -- The providers with waiting messages, one index probe each.
    SELECT min(provider) AS name FROM outbox WHERE state IN ('open', 'sending', 'pending')
    UNION ALL
    SELECT (SELECT min(o.provider) FROM outbox o
            WHERE o.state IN ('open', 'sending', 'pending') AND o.provider > p.name)
    FROM provider p WHERE p.name IS NOT NULL
),
-- A paused provider gets one probe when its pause is over.
room AS (
    SELECT p.name, b.paused_until IS NOT NULL AS probes,
           CASE WHEN b.paused_until IS NOT NULL THEN 1
                ELSE %(share)s::int - coalesce((%(busy)s::jsonb ->> p.name)::int, 0) END AS free
    FROM provider p
    LEFT JOIN breakers b ON b.provider = p.name
    WHERE p.name IS NOT NULL AND coalesce(b.paused_until <= now(), true)
),
due AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.target, d.digest, d.critical, d.state, d.attempts, d.created_at,
           d.provider, d.available_at, d.crashes + (d.state = 'sending')::int AS crashes, room.probes
    FROM room
    CROSS JOIN LATERAL (
        SELECT o.user_id, o.id, o.channel, o.target, o.digest, o.critical, o.state, o.attempts, o.created_at,
               o.provider, o.available_at, o.crashes
        FROM outbox o
        WHERE o.provider = room.name AND o.state IN ('open', 'sending', 'pending') AND o.available_at <= now()
          AND (o.digest IS NULL OR o.token_minute IS NOT NULL)
          AND (o.crashes + (o.state = 'sending')::int >= 3) = %(alone)s::boolean
        ORDER BY o.available_at
        LIMIT greatest(0, least(room.free, %(room)s::int))
        FOR UPDATE SKIP LOCKED
    ) d
    ORDER BY d.available_at
    LIMIT %(room)s::int
),
probed AS (
    UPDATE breakers b
    SET paused_until = now() + interval '30 seconds'
    FROM due d WHERE d.probes AND b.provider = d.provider
),
-- Where each message would go; no address means its target is gone.
addressed AS MATERIALIZED (
    SELECT d.user_id, d.id, p.locale, p.email, p.email_enabled, p.push_enabled, p.events,
           CASE d.channel
                WHEN 'email' THEN jsonb_build_object('email', p.email)
                WHEN 'push' THEN (SELECT jsonb_build_object('endpoint', s.endpoint, 'p256dh', s.p256dh, 'auth', s.auth)
                                  FROM push_subscriptions s WHERE s.user_id = d.user_id AND s.id = d.target)
                ELSE (SELECT jsonb_build_object('url', w.url, 'sealed', jsonb_build_array(
                                 encode(w.secret, 'base64'),
                                 CASE WHEN w.old_secret_until > now() THEN encode(w.old_secret, 'base64') END))
                      FROM webhook_endpoints w WHERE w.id = d.target AND w.disabled_at IS NULL)
           END AS address,
           CASE WHEN d.channel <> 'webhook' AND NOT d.critical THEN
               (SELECT q.until FROM quiet_users q WHERE q.user_id = d.user_id) END AS until
    FROM due d
    LEFT JOIN notification_preferences p ON p.user_id = d.user_id
),
item AS MATERIALIZED (
    SELECT v.user_id, v.message_id, v.notification_id, v.target, d.channel, n.event_name, n.severity, n.created_at,
           CASE WHEN NOT n.private THEN left(coalesce(n.summary, n.title), 200) END AS text,
           CASE WHEN n.read_at IS NOT NULL OR n.archived_at IS NOT NULL THEN 'already_read'
                WHEN d.channel = 'email' AND x.reason = 'unsubscribed' THEN 'unsubscribed'
                WHEN NOT coalesce(CASE d.channel WHEN 'email' THEN a.email_enabled
                                                 WHEN 'push' THEN a.push_enabled END, true)
                     OR NOT coalesce(switch.enabled, true) THEN 'preference_off'
                WHEN d.channel = 'email' AND (a.email IS NULL OR x.reason = 'bounced') THEN 'no_address'
           END AS reason
    FROM due d
    JOIN addressed a ON a.user_id = d.user_id AND a.id = d.id
    JOIN deliveries v ON v.user_id = d.user_id AND v.message_id = d.id AND v.status = 'queued'
    JOIN notifications n ON n.user_id = v.user_id AND n.id = v.notification_id
    LEFT JOIN LATERAL (
        SELECT (e.channels ->> d.channel)::boolean AS enabled
        FROM jsonb_each(a.events) AS e (pattern, channels)
        WHERE a.events <> '{}' AND e.channels ? d.channel
          AND (e.pattern IN (n.event_name, '*')
               OR e.pattern LIKE '%%.*' AND starts_with(n.event_name, left(e.pattern, -1)))
        ORDER BY e.pattern = n.event_name DESC, length(e.pattern) DESC LIMIT 1
    ) switch ON true
    LEFT JOIN LATERAL (
        SELECT max(s.reason) AS reason FROM suppressions s
        WHERE s.user_id = d.user_id AND s.channel = d.channel
          AND (s.reason = 'unsubscribed' OR s.hits >= 2 AND s.address = a.email)
    ) x ON true
),
verdict AS MATERIALIZED (
    SELECT d.user_id, d.id, a.until, coalesce(i.total, 0) AS total, i.event_name, i.newest_id,
           CASE WHEN coalesce(i.total, 0) = 0 THEN 'void'
                WHEN d.crashes >= 10 OR a.address IS NULL THEN 'failed'
                WHEN a.until IS NOT NULL THEN 'pending'
                ELSE 'sending' END AS state,
           CASE WHEN d.crashes >= 10 THEN 'it ended its worker ten times'
                WHEN a.address IS NULL THEN 'its endpoint or subscription is gone' END AS error
    FROM due d
    JOIN addressed a ON a.user_id = d.user_id AND a.id = d.id
    LEFT JOIN (
        SELECT user_id, message_id, count(*) AS total, max(event_name) AS event_name,
               max(notification_id::text)::uuid AS newest_id
        FROM item WHERE reason IS NULL GROUP BY user_id, message_id
    ) i ON i.user_id = d.user_id AND i.message_id = d.id
),
claimed AS (
    UPDATE outbox o
    SET state = v.state, claim_seq = o.claim_seq + 1, crashes = d.crashes,
        available_at = CASE v.state WHEN 'sending' THEN now() + %(lease)s::float8 * interval '1 second'
                                    WHEN 'pending' THEN v.until ELSE o.available_at END,
        last_error = coalesce(v.error, o.last_error),
        finished_at = CASE WHEN v.state IN ('void', 'failed') THEN now() END
    FROM due d JOIN verdict v ON v.user_id = d.user_id AND v.id = d.id
    WHERE o.user_id = d.user_id AND o.id = d.id
    RETURNING o.user_id, o.id, o.claim_seq, o.state
),
settled AS (
    UPDATE deliveries v
    SET status = CASE WHEN i.reason IS NULL THEN 'failed' ELSE 'suppressed' END,
        reason = i.reason, last_error = CASE WHEN i.reason IS NULL THEN d.error END
    FROM item i JOIN verdict d ON d.user_id = i.user_id AND d.id = i.message_id
    WHERE v.user_id = i.user_id AND v.notification_id = i.notification_id AND v.channel = i.channel
      AND v.target = i.target AND (i.reason IS NOT NULL OR d.state = 'failed')
)
SELECT json_build_object(
    'user_id', c.user_id, 'id', c.id, 'claim_seq', c.claim_seq, 'channel', d.channel, 'provider', d.provider,
    'locale', coalesce(a.locale, 'en'), 'attempts', d.attempts, 'created_at', d.created_at, 'address', a.address,
    'total', v.total, 'newest_id', v.newest_id, 'event_name', CASE WHEN v.total = 1 THEN v.event_name END,
    'lines', lines.shown) AS message
FROM claimed c
JOIN due d ON d.user_id = c.user_id AND d.id = c.id
JOIN addressed a ON a.user_id = c.user_id AND a.id = c.id
JOIN verdict v ON v.user_id = c.user_id AND v.id = c.id
CROSS JOIN LATERAL (
    SELECT json_agg(json_build_object('id', t.notification_id, 'text', t.text, 'event_name', t.event_name,
                                      'severity', t.severity, 'created_at', t.created_at)) AS shown
    FROM (SELECT i.notification_id, i.text, i.event_name, i.severity, i.created_at
          FROM item i
          WHERE i.user_id = c.user_id AND i.message_id = c.id AND i.reason IS NULL
          ORDER BY array_position('{info,success,warning,critical}', i.severity) DESC, i.notification_id DESC
          LIMIT 10) t
) lines
WHERE c.state = 'sending'
