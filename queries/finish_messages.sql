-- Writes down what became of claimed messages, in one statement for many. Only the newest claim of a
-- message may: a worker that lost its lease changes nothing. Returns how many results of each kind were written.
WITH result AS MATERIALIZED (
    SELECT r.user_id, r.id, r.claim_seq, r.email, r.verdict, r.error, r.retry_after
    FROM jsonb_to_recordset(%(results)s::jsonb) AS r (
        user_id text, id uuid, claim_seq int, email text, verdict text, error text, retry_after float8)
),
-- The results that still may be written: the claim is the newest. Found by key, one by one, which OFFSET 0
-- makes sure of.
mine AS MATERIALIZED (
    SELECT o.user_id, o.id, o.claim_seq, o.place, o.provider, o.attempts, o.faults,
           r.email, r.verdict, r.error, r.retry_after
    FROM result r
    CROSS JOIN LATERAL (
        SELECT m.user_id, m.id, m.claim_seq, m.ctid AS place, m.provider, m.attempts, m.faults
        FROM outbox m
        WHERE m.user_id = r.user_id AND m.id = r.id AND m.claim_seq = r.claim_seq AND m.state = 'sending'
        OFFSET 0
    ) o
),
-- Ten faults of a provider in a row pause it; anything else it does ends the row.
recovered AS (
    UPDATE breakers b
    SET faults = 0, paused_until = NULL
    WHERE (b.faults > 0 OR b.paused_until IS NOT NULL)
      AND b.provider IN (SELECT provider FROM mine WHERE verdict <> 'fault')
),
-- Providers that did nothing but fail in these results.
broken AS MATERIALIZED (
    INSERT INTO breakers AS b (provider, faults, paused_until)
    SELECT provider, count(*), CASE WHEN count(*) >= 10 THEN now() + interval '30 seconds' END
    FROM mine GROUP BY provider HAVING bool_and(verdict = 'fault') ORDER BY provider
    ON CONFLICT (provider) DO UPDATE
    SET faults = b.faults + EXCLUDED.faults,
        paused_until = CASE WHEN b.faults + EXCLUDED.faults >= 10 THEN now() + interval '30 seconds' END
    RETURNING b.provider, b.paused_until IS NOT NULL AS paused
),
-- While a provider is paused a fault costs its message nothing.
judged AS MATERIALIZED (
    SELECT m.user_id, m.id, m.claim_seq, m.place, m.email, m.verdict, m.error, m.retry_after,
           coalesce(b.paused, false) AS paused,
           m.attempts + (m.verdict <> 'sent')::int AS attempts,
           CASE WHEN m.verdict = 'fault' THEN m.faults + 1 ELSE 0 END AS faults,
           CASE WHEN m.verdict = 'sent' THEN 'sent'
                WHEN m.verdict IN ('dead', 'bounced', 'gone') THEN 'failed'
                WHEN b.paused THEN 'pending'
                WHEN m.attempts + 1 >= least(%(max_attempts)s::int, CASE m.verdict WHEN 'refused' THEN 3 END)
                THEN 'failed'
                ELSE 'pending' END AS state
    FROM mine m
    LEFT JOIN broken b ON b.provider = m.provider
),
-- The faults that led to the pause are given back to everybody who waits with them.
spared AS (
    UPDATE outbox o
    SET attempts = greatest(0, o.attempts - o.faults), faults = 0, available_at = now()
    FROM broken b
    WHERE b.paused AND o.provider = b.provider AND o.faults > 0 AND o.state = 'pending'
),
-- The delay doubles with each failure, spread over its upper half so that many do not return at once.
finished AS MATERIALIZED (
    UPDATE outbox o
    SET state = j.state,
        attempts = CASE WHEN j.paused THEN greatest(0, j.attempts - j.faults) ELSE j.attempts END,
        faults = CASE WHEN j.paused THEN 0 ELSE j.faults END,
        crashes = 0, last_error = coalesce(nullif(j.error, ''), o.last_error),
        finished_at = CASE WHEN j.state <> 'pending' THEN now() END,
        available_at = now() + CASE
            WHEN j.state <> 'pending' OR j.paused THEN interval '0'
            WHEN j.retry_after IS NOT NULL THEN greatest(1, least(86400, j.retry_after)) * interval '1 second'
            ELSE least(%(retry_max)s::float8, %(retry_base)s::float8 * 2.0 ^ least(j.attempts, 60))
                 * (0.5 + random() / 2) * interval '1 second' END
    FROM judged j
    WHERE o.ctid = ANY (ARRAY(SELECT m.place FROM mine m)) AND o.user_id = j.user_id AND o.id = j.id
      AND o.claim_seq = j.claim_seq AND o.state = 'sending'
    RETURNING o.user_id, o.id, o.channel, o.target, o.state, j.email, j.verdict, j.error
),
-- Each item of the message ends like the message.
told AS (
    UPDATE deliveries v
    SET status = f.state, sent_at = CASE f.state WHEN 'sent' THEN now() END, last_error = nullif(f.error, '')
    FROM finished f
    WHERE f.state IN ('sent', 'failed') AND v.user_id = f.user_id AND v.message_id = f.id AND v.status = 'queued'
),
-- What the provider said for good: a browser that left, an endpoint that closed, a dead address.
lost_browsers AS (
    DELETE FROM push_subscriptions s USING finished f
    WHERE f.verdict = 'gone' AND f.channel = 'push' AND s.user_id = f.user_id AND s.id = f.target
    RETURNING s.user_id
),
-- 410 closes an endpoint; nothing else does.
closed_endpoints AS (
    UPDATE webhook_endpoints w
    SET disabled_at = now()
    FROM finished f
    WHERE f.verdict = 'gone' AND f.channel = 'webhook' AND w.id = f.target AND w.disabled_at IS NULL
    RETURNING w.url
),
-- An address is dead at its second bounce in a row; a mail that is taken ends the row.
bounced AS (
    SELECT DISTINCT ON (user_id) user_id, email, count(*) OVER (PARTITION BY user_id, email) AS times
    FROM finished WHERE verdict = 'bounced' ORDER BY user_id, email
),
-- A new address starts anew.
bounces AS (
    INSERT INTO suppressions AS s (user_id, channel, address, reason, hits)
    SELECT user_id, 'email', email, 'bounced', times FROM bounced ORDER BY user_id
    ON CONFLICT (user_id, channel, reason) DO UPDATE
    SET hits = EXCLUDED.hits + CASE WHEN s.address = EXCLUDED.address THEN s.hits ELSE 0 END,
        address = EXCLUDED.address
    RETURNING s.user_id, s.hits
),
-- A mail that was taken shows that the address lives.
alive AS (
    DELETE FROM suppressions s USING finished f
    WHERE s.user_id = f.user_id AND s.channel = 'email' AND s.reason = 'bounced' AND s.hits < 2
      AND f.channel = 'email' AND f.verdict = 'sent' AND f.user_id NOT IN (SELECT b.user_id FROM bounced b)
),
-- The notice goes through intake, so that it is exactly as sure as what caused it.
noticed AS (
    INSERT INTO intake (payload)
    SELECT jsonb_build_object('user_id', n.user_id, 'event_name', 'bellhop.channel_disabled',
                              'severity', 'warning', 'title', words.text ->> ('notice.' || n.channel || '_title'),
                              'body', coalesce(n.about || E'\n', '') || (words.text ->> ('notice.' || n.channel || '_body')),
                              'target_url', CASE n.channel WHEN 'webhook' THEN '/admin' ELSE '/preferences' END)
    FROM (
        SELECT user_id, 'push' AS channel, NULL AS about FROM lost_browsers
        UNION ALL
        SELECT s.user_id, 'email', NULL FROM bounces s JOIN bounced b ON b.user_id = s.user_id
        WHERE s.hits >= 2 AND s.hits - b.times < 2
        UNION ALL
        SELECT admin.id, 'webhook', e.url
        FROM closed_endpoints e CROSS JOIN unnest(%(admins)s::text[]) AS admin (id)
    ) n
    LEFT JOIN notification_preferences p ON p.user_id = n.user_id
    CROSS JOIN LATERAL (
        SELECT coalesce(%(notices)s::jsonb -> lower(split_part(translate(p.locale, '_', '-'), '-', 1)),
                        %(notices)s::jsonb -> 'en') AS text
    ) words
)
SELECT channel, state, verdict, count(*) AS times FROM finished GROUP BY channel, state, verdict
