-- Claims due messages for the length of a lease, each provider up to its share, and looks at every item again:
-- what was read or switched off since is suppressed, a message without items is void. Returns what is to be sent,
-- a digest with at most ten lines, and a row without id for each that needs no sending. claim_seq is the fence.
WITH probing AS MATERIALIZED (
    -- A pause that is over lets one probe through; whoever holds the row is the one who sends it.
    SELECT provider FROM breakers WHERE paused_until <= now() FOR UPDATE SKIP LOCKED
),
-- How many more of each provider's messages this process may take, and of its whole channel: slow ones leave
-- room for others, however many hosts they are. With a quarter a provider may have three eighths a channel.
room AS (
    SELECT p.name, q.provider IS NOT NULL AS probes,
           %(share)s::int - coalesce((%(busy)s::jsonb ->> p.name)::int, 0) AS free,
           (SELECT greatest(1, %(share)s::int * 3 / 2) - coalesce(sum(b.n::int), 0)
            FROM jsonb_each_text(%(busy)s::jsonb) AS b (provider, n)
            WHERE split_part(b.provider, ':', 1) = split_part(p.name, ':', 1)) AS channel_free
    FROM awaited_providers p
    LEFT JOIN probing q ON q.provider = p.name
    WHERE p.paused_until IS NULL OR q.provider IS NOT NULL
),
-- What ended its worker three times is to run alone: it waits until nothing is under way here, and when it
-- has been due for ten seconds nothing else is begun.
suspect AS MATERIALIZED (
    SELECT s.provider, %(busy)s::jsonb = '{}' AS alone, s.available_at < now() - interval '10 seconds' AS overdue
    FROM (
        SELECT o.provider, o.available_at FROM outbox o
        WHERE o.crashes >= 2  -- as the index outbox_suspects has it
          AND o.crashes + (o.state = 'sending')::int >= 3
          AND o.state IN ('open', 'sending', 'pending') AND o.available_at <= now()
          AND (o.state = 'sending' OR o.token_minute >= date_trunc('minute', now()))
        OFFSET 0
    ) s
    JOIN room ON room.name = s.provider
    ORDER BY s.available_at
    LIMIT 1
),
-- How many each provider may be given now; what is critical finds a slot more than the others may fill.
given AS (
    SELECT room.*, lane.critical, coalesce(suspect.alone, false) AS alone,
           CASE WHEN suspect.alone THEN (suspect.provider = room.name)::int
                WHEN suspect.overdue THEN 0
                ELSE greatest(0, least(room.free + lane.critical::int, %(room)s::int)) END AS most
    FROM room LEFT JOIN suspect ON true
    CROSS JOIN (VALUES (true), (false)) AS lane (critical)
),
-- The oldest due ones of each provider with a token of this minute, the critical ones first, locked; an expired lease
-- is due again and counts as a crash. Its number is its place among its provider's.
ready AS MATERIALIZED (
    SELECT d.user_id, d.id, d.channel, d.target, d.digest, d.critical, d.state, d.created_at,
           d.provider, d.available_at, d.crashes + (d.state = 'sending')::int AS crashes, d.place, given.probes,
           given.channel_free, given.free, given.most,
           row_number() OVER (PARTITION BY d.provider ORDER BY d.critical DESC, d.available_at) AS number
    FROM given
    CROSS JOIN LATERAL (
        SELECT o.user_id, o.id, o.channel, o.target, o.digest, o.critical, o.state, o.created_at,
               o.provider, o.available_at, o.crashes, o.xmin AS version, o.ctid AS place
        FROM outbox o
        WHERE o.provider = given.name AND o.critical = given.critical
          AND o.state IN ('open', 'sending', 'pending') AND o.available_at <= now()
          AND (o.state = 'sending' OR o.token_minute >= date_trunc('minute', now()))
          AND (o.crashes + (o.state = 'sending')::int >= 3) = given.alone
        ORDER BY o.available_at
        LIMIT given.most
        FOR UPDATE SKIP LOCKED
    ) d
    -- What joined a digest since this statement began cannot be seen here and would be lost in it.
    WHERE d.digest IS NULL
       OR d.version = (SELECT seen.xmin FROM outbox seen WHERE seen.user_id = d.user_id AND seen.id = d.id)
),
-- What is critical comes first, then who has the fewest under way: a backlog takes no slot from a host that
-- answers.
due AS MATERIALIZED (
    SELECT t.*
    FROM (
        SELECT r.*, r.number - r.free AS turn,
               row_number() OVER (PARTITION BY r.channel
                                  ORDER BY r.critical DESC, r.number - r.free, r.available_at) AS channel_number
        FROM ready r WHERE r.number <= r.most
    ) t
    WHERE t.channel_number <= t.channel_free + t.critical::int
    ORDER BY t.critical DESC, t.turn, t.available_at
    LIMIT %(room)s::int
),
-- Each message with its address (none: its target is gone) and with what it still has to say. OFFSET 0
-- keeps the planner from joining whole tables where one row is found by its key, and from repeating an
-- expression wherever its result is used.
looked AS MATERIALIZED (
    SELECT d.*, p.locale, a.address, p.until, c.*,
           CASE WHEN c.total = 0 THEN 'void'
                WHEN d.crashes >= 10 OR a.address IS NULL THEN 'failed'
                WHEN p.until IS NOT NULL THEN 'held'
                ELSE 'sending' END AS verdict,
           CASE WHEN d.crashes >= 10 THEN 'it ended its worker ten times'
                WHEN a.address IS NULL AND c.total > 0 THEN 'its endpoint or subscription is gone' END AS error
    FROM due d
    LEFT JOIN LATERAL (
        SELECT w.locale, w.email, w.events,
               CASE WHEN w.quiet_from <> w.quiet_to AND d.channel <> 'webhook' AND NOT d.critical THEN
                   (SELECT q.until FROM quiet_users q WHERE q.user_id = d.user_id) END AS until,
               CASE d.channel WHEN 'email' THEN w.email_enabled AND %(mail)s::boolean
                              WHEN 'push' THEN w.push_enabled END AS enabled
        FROM notification_preferences w WHERE w.user_id = d.user_id
        OFFSET 0
    ) p ON true
    CROSS JOIN LATERAL (
        SELECT CASE d.channel
                    WHEN 'email' THEN p.email
                    WHEN 'push' THEN (SELECT json_build_object('endpoint', s.endpoint, 'p256dh', s.p256dh, 'auth', s.auth)
                                      FROM push_subscriptions s WHERE s.user_id = d.user_id AND s.id = d.target)::text
                    ELSE (SELECT w.address FROM webhook_addresses w WHERE w.id = d.target AND w.disabled_at IS NULL)::text
               END AS address,
               coalesce(p.enabled, d.channel = 'webhook') AS enabled,
               (SELECT max(s.reason) FROM suppressions s
                WHERE s.user_id = d.user_id AND s.channel = d.channel
                  AND (s.reason = 'unsubscribed' OR s.hits >= 2 AND s.address = p.email)) AS suppressed
        OFFSET 0
    ) a
    CROSS JOIN LATERAL (
        -- A message that is no digest has one item, which max() gives.
        SELECT count(*) FILTER (WHERE i.reason IS NULL) AS total,
               max(i.id::text) FILTER (WHERE i.reason IS NULL) AS newest_id,
               max(i.text) FILTER (WHERE i.reason IS NULL) AS text,
               max(i.event_name) FILTER (WHERE i.reason IS NULL) AS event_name,
               max(i.severity) FILTER (WHERE i.reason IS NULL) AS severity,
               max(i.created_at) FILTER (WHERE i.reason IS NULL) AS told_at,
               array_agg(json_build_object('id', i.id, 'text', i.text, 'event_name', i.event_name,
                                           'severity', i.severity, 'created_at', i.created_at))
               FILTER (WHERE i.reason IS NULL AND d.digest IS NOT NULL) AS lines,
               array_agg(i.id) FILTER (WHERE i.reason IS NOT NULL) AS dropped,
               array_agg(i.reason) FILTER (WHERE i.reason IS NOT NULL) AS reasons
        FROM deliveries v
        CROSS JOIN LATERAL (
            SELECT n.id, n.event_name, n.severity, n.created_at,
                   CASE WHEN NOT n.private THEN coalesce(nullif(n.summary, ''), n.title) END AS text,
                   CASE WHEN n.read_at IS NOT NULL OR n.archived_at IS NOT NULL THEN 'already_read'
                        WHEN a.suppressed = 'unsubscribed' THEN 'unsubscribed'
                        WHEN NOT a.enabled THEN 'preference_off'
                        WHEN p.events <> '{}' AND NOT coalesce((
                            SELECT (e.channels ->> d.channel)::boolean
                            FROM jsonb_each(p.events) AS e (pattern, channels)
                            WHERE e.channels ? d.channel
                              AND (e.pattern IN (n.event_name, '*')
                                   OR e.pattern LIKE '%%.*' AND starts_with(n.event_name, left(e.pattern, -1)))
                            ORDER BY e.pattern = n.event_name DESC, length(e.pattern) DESC LIMIT 1
                        ), true) THEN 'preference_off'
                        WHEN d.channel = 'email' AND (p.email IS NULL OR a.suppressed = 'bounced') THEN 'no_address'
                   END AS reason
            FROM notifications n WHERE n.user_id = v.user_id AND n.id = v.notification_id
            OFFSET 0
        ) i
        WHERE v.user_id = d.user_id AND v.message_id = d.id AND v.status = 'queued'
    ) c
),
-- Of a paused provider's messages one is sent; what needs no sending is settled all the same.
decided AS NOT MATERIALIZED (
    SELECT v.* FROM looked v
    WHERE NOT v.probes OR v.verdict <> 'sending' OR v.place IN (
        SELECT DISTINCT ON (probe.provider) probe.place
        FROM looked probe WHERE probe.probes AND probe.verdict = 'sending'
        ORDER BY probe.provider, probe.critical DESC, probe.available_at)
),
-- The next probe waits half a minute.
probed AS (
    UPDATE breakers b
    SET paused_until = now() + interval '30 seconds'
    FROM decided d WHERE d.probes AND d.verdict = 'sending' AND b.provider = d.provider
),
-- What became needless or unwanted since it was created.
suppressed AS (
    UPDATE deliveries v
    SET status = 'suppressed', reason = x.reason
    FROM decided d CROSS JOIN LATERAL unnest(d.dropped, d.reasons) AS x (id, reason)
    WHERE d.dropped IS NOT NULL
      AND v.user_id = d.user_id AND v.notification_id = x.id AND v.channel = d.channel AND v.target = d.target
),
-- What nobody can be told any more.
given_up AS (
    UPDATE deliveries v
    SET status = 'failed', last_error = d.error
    FROM decided d
    WHERE d.verdict = 'failed' AND v.user_id = d.user_id AND v.message_id = d.id AND v.status = 'queued'
      AND v.notification_id <> ALL (coalesce(d.dropped, '{}'))
)
-- In quiet hours a message loses its token: update_due_messages folds it into the quiet digest, or has it wait.
UPDATE outbox o
SET state = CASE WHEN d.verdict <> 'held' THEN d.verdict WHEN d.state = 'open' THEN 'open' ELSE 'pending' END,
    claim_seq = o.claim_seq + 1, crashes = d.crashes,
    available_at = CASE WHEN d.verdict = 'sending' THEN now() + %(lease)s::float8 * interval '1 second'
                        ELSE o.available_at END,
    token_minute = CASE WHEN d.verdict <> 'held' THEN o.token_minute END,
    last_error = coalesce(d.error, o.last_error),
    finished_at = CASE WHEN d.verdict IN ('void', 'failed') THEN now() END
FROM decided d
WHERE o.ctid = ANY (ARRAY(SELECT found.place FROM decided found)) AND o.user_id = d.user_id AND o.id = d.id
-- The fields of a Line, then of Outgoing: to build JSON of them would cost as much as all the looking.
RETURNING d.newest_id::uuid, d.text, d.event_name, d.severity, d.told_at,
          o.user_id, CASE WHEN d.verdict = 'sending' THEN o.id END, o.claim_seq, d.channel, d.provider,
          -- A digest is complete now, however long it gathered.
          coalesce(d.locale, 'en'), CASE WHEN d.digest IS NULL THEN d.created_at ELSE now() END, d.address, d.total,
          CASE WHEN d.total = 1 THEN d.event_name END,
          -- Of a digest the most severe ten, then the newest.
          CASE WHEN d.lines IS NOT NULL THEN (
              SELECT json_agg(top.line) FROM (
                  SELECT line FROM unnest(d.lines) AS line
                  ORDER BY array_position('{info,success,warning,critical}', line ->> 'severity') DESC,
                           (line ->> 'id')::uuid DESC
                  LIMIT 10) top) END,
          d.digest IS NOT NULL, d.crashes >= 3
