-- Bellhop's whole database. Idempotent: applied by a start that finds it changed, under an advisory lock.
--
-- notifications             one thing one user was told; read_at is the only read state
-- notification_preferences  a user's choices and address; no row means the defaults
-- push_subscriptions        one browser that may be pushed to
-- webhook_endpoints         one URL that is told about notifications
-- outbox                    one message that leaves: the unit of claim, lease and attempt
-- deliveries                what became of one notification on one channel and target
-- rate_limits               messages per user (webhook: per endpoint) in the newest minute
-- suppressions              why an address is not written to: unsubscribed, or bouncing
-- breakers                  one outside provider: faults in a row, and until when it rests
-- api_keys                  callers that are programs; only the SHA-256 of a key is kept
-- intake                    a notification for later, or from another program's transaction
-- schema_version            how new this schema is; newer than the code refuses to start
--
-- A message's state:  open → sending → sent | failed | void;  sending → pending → sending.
-- A delivery's state: queued, then exactly one of sent, failed, suppressed, cancelled.
--
-- user_id leads every key that holds a user's rows: reads stay local to one user, the owner is
-- in every WHERE, and the tables can be distributed by it later.

SET LOCAL lock_timeout = 0;  -- another start may be at it, for as long as an index takes
SELECT pg_advisory_xact_lock(hashtext('bellhop schema'));
DO $$ BEGIN
    IF current_setting('server_version_num')::int < 140000 THEN
        RAISE EXCEPTION 'PostgreSQL 14 or later is needed, not %', current_setting('server_version');
    END IF;
    IF current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII') THEN
        RAISE EXCEPTION 'a database in UTF8 is needed, not in %', current_setting('server_encoding');
    END IF;
    IF to_regclass('schema_version') IS NOT NULL THEN
        IF (SELECT max(version) FROM schema_version) > 1 THEN
            RAISE EXCEPTION 'the database belongs to a newer release of Bellhop';
        END IF;
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS schema_version (
    version     integer NOT NULL CONSTRAINT schema_version_pkey PRIMARY KEY,
    digest      text,                   -- SHA-256 of the file that was applied last
    applied_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE schema_version IS 'one row: the newest release that shaped this database';

CREATE TABLE IF NOT EXISTS notifications (
    user_id          text NOT NULL,
    id               uuid NOT NULL,     -- UUIDv7: the primary key backwards is the inbox order
    event_name       text NOT NULL,
    title            text NOT NULL,
    body             text NOT NULL,     -- never leaves the app
    summary          text,              -- what may leave instead of the title
    target_url       text,
    severity         text NOT NULL CONSTRAINT notifications_severity_known
                     CHECK (severity IN ('info', 'success', 'warning', 'critical')),
    data             jsonb NOT NULL DEFAULT '{}',  -- never leaves the app
    idempotency_key  text,
    batch_key        text,
    subject_key      text,
    private          boolean NOT NULL DEFAULT false,  -- nothing of its text leaves the app
    read_at          timestamptz,       -- NULL: unread
    archived_at      timestamptz,       -- set: out of the list and of the count
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT notifications_pkey PRIMARY KEY (user_id, id)  -- serves: list_notifications
);
COMMENT ON TABLE notifications IS 'the source of truth: what each user was told';
CREATE UNIQUE INDEX IF NOT EXISTS notifications_idempotency_key
    ON notifications (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
    -- serves: create_notifications (the conflict that makes a key unique)
CREATE INDEX IF NOT EXISTS notifications_unread
    ON notifications (user_id, id) WHERE read_at IS NULL AND archived_at IS NULL;
    -- serves: get_unread_count, list_notifications?unread=1, update_all_notifications
CREATE INDEX IF NOT EXISTS notifications_unsettled
    ON notifications (subject_key) WHERE subject_key IS NOT NULL AND (read_at IS NULL OR archived_at IS NULL);
    -- serves: update_resolved_notifications

CREATE TABLE IF NOT EXISTS notification_preferences (
    user_id         text NOT NULL CONSTRAINT notification_preferences_pkey PRIMARY KEY
                    CONSTRAINT preferences_user_id_size CHECK (length(user_id) <= 200),
    email           text,               -- the address; NULL: none
    in_app_enabled  boolean NOT NULL DEFAULT true,
    email_enabled   boolean NOT NULL DEFAULT false,
    push_enabled    boolean NOT NULL DEFAULT false,
    digest_minutes  integer NOT NULL DEFAULT 5,
    min_severity    text NOT NULL DEFAULT 'warning' CONSTRAINT preferences_severity_known
                    CHECK (min_severity IN ('info', 'success', 'warning', 'critical')),
    quiet_from      time,               -- quiet hours hold only when both ends are set
    quiet_to        time,
    timezone        text NOT NULL DEFAULT 'UTC' CONSTRAINT preferences_timezone_known
                    CHECK (timestamptz '2000-01-01 00:00+00' AT TIME ZONE timezone IS NOT NULL),
    locale          text,               -- NULL: not chosen; messages are in English, pages as the browser asks
    events          jsonb NOT NULL DEFAULT '{}'  -- {"comment.*": {"email": false}}
                    CONSTRAINT preferences_events_size CHECK (octet_length(events::text) <= 32768)
);
COMMENT ON TABLE notification_preferences IS 'choices and contact; never written by a create';

CREATE TABLE IF NOT EXISTS push_subscriptions (
    user_id     text NOT NULL,
    id          uuid NOT NULL DEFAULT gen_random_uuid(),
    endpoint    text NOT NULL,
    host        text NOT NULL,          -- of the endpoint: the provider the breaker watches
    p256dh      text NOT NULL,
    auth        text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT push_subscriptions_pkey PRIMARY KEY (user_id, id)
);
COMMENT ON TABLE push_subscriptions IS 'one browser, one reader';
CREATE UNIQUE INDEX IF NOT EXISTS push_subscriptions_browser ON push_subscriptions (md5(endpoint));
    -- serves: create_push_subscription (one browser, one row; a new reader takes it over)

CREATE TABLE IF NOT EXISTS webhook_endpoints (
    id              uuid NOT NULL DEFAULT gen_random_uuid()
                    CONSTRAINT webhook_endpoints_pkey PRIMARY KEY,
    user_id         text,               -- NULL: every user's notifications
    url             text NOT NULL,
    host            text NOT NULL,
    events          text[] NOT NULL DEFAULT '{*}',
    min_severity    text NOT NULL DEFAULT 'warning' CONSTRAINT webhooks_severity_known
                    CHECK (min_severity IN ('info', 'success', 'warning', 'critical')),
    secret          bytea NOT NULL,     -- encrypted with a key derived from BELLHOP_SECRET
    old_secrets     jsonb NOT NULL DEFAULT '[]',  -- [{"sealed", "until"}]: each still signs until then
    disabled_at     timestamptz,        -- set by a 410 or by an admin
    created_at      timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE webhook_endpoints IS 'where notifications are announced to other programs';

CREATE TABLE IF NOT EXISTS outbox (
    user_id       text NOT NULL,
    id            uuid NOT NULL,        -- the message's identity outside; never changes
    channel       text NOT NULL CONSTRAINT outbox_channel_known
                  CHECK (channel IN ('email', 'push', 'webhook')),
    target        uuid NOT NULL,        -- subscription or endpoint; all zeros for e-mail
    digest        text,                 -- what collects here: key:<batch_key>, overflow, quiet; skipped:<id>
    critical      boolean NOT NULL DEFAULT false,  -- leaves whatever the hour or the limit
    state         text NOT NULL DEFAULT 'open' CONSTRAINT outbox_state_known CHECK (state IN (
        'open',     -- not yet claimed; a digest still collects
        'sending',  -- claimed; available_at is the end of the lease
        'pending',  -- tried or released; waits for available_at
        'sent',     -- accepted outside
        'failed',   -- given up
        'void'      -- nothing was left to say
    )),
    available_at  timestamptz NOT NULL, -- when due; while sending, when the lease ends
    claim_seq     integer NOT NULL DEFAULT 0,  -- grows at every claim: the fence
    attempts      integer NOT NULL DEFAULT 0,  -- finished tries that failed
    faults        integer NOT NULL DEFAULT 0,  -- how many of the last attempts were provider faults
    crashes       integer NOT NULL DEFAULT 0,  -- leases that ran out in a row
    provider      text NOT NULL,        -- email, or the channel and host: what the breaker watches
    token_minute  timestamptz,          -- the minute in which its rate-limit token lets it leave; infinity: any
    last_error    text,                 -- the provider's words, for admins
    created_at    timestamptz NOT NULL DEFAULT now(),
    finished_at   timestamptz,
    CONSTRAINT outbox_pkey PRIMARY KEY (user_id, id)
) WITH (fillfactor = 40);              -- claim and finish find room beside what they replace
COMMENT ON TABLE outbox IS 'one message that leaves';
CREATE UNIQUE INDEX IF NOT EXISTS outbox_window
    ON outbox (user_id, channel, target, digest) WHERE state = 'open' AND digest IS NOT NULL;
    -- serves: create_notifications (the open window that an event joins)
CREATE INDEX IF NOT EXISTS outbox_turn
    ON outbox (provider, critical, available_at) WHERE state IN ('open', 'sending', 'pending');
    -- serves: claim_messages
CREATE INDEX IF NOT EXISTS outbox_tokens
    ON outbox (provider, coalesce(token_minute, '-infinity'), available_at) WHERE state IN ('open', 'pending');
    -- serves: update_due_messages
CREATE INDEX IF NOT EXISTS outbox_faults ON outbox (provider) WHERE faults > 0 AND state = 'pending';
    -- serves: finish_messages (what a pause gives back)
CREATE INDEX IF NOT EXISTS outbox_suspects ON outbox (available_at) WHERE crashes >= 2;
    -- serves: claim_messages (what is to run alone)
CREATE INDEX IF NOT EXISTS outbox_finished
    ON outbox (finished_at) WHERE finished_at IS NOT NULL;
    -- serves: prune_messages, get_stats

CREATE TABLE IF NOT EXISTS deliveries (
    user_id          text NOT NULL,
    notification_id  uuid NOT NULL,
    channel          text NOT NULL,
    target           uuid NOT NULL,     -- as in outbox
    id               uuid NOT NULL,
    message_id       uuid,              -- the outbox row that carries it; NULL: suppressed at once
    status           text NOT NULL CONSTRAINT deliveries_status_known CHECK (status IN (
        'queued',      -- its message has not left yet
        'sent',        -- its message was accepted outside
        'failed',      -- its message was given up
        'suppressed',  -- not sent for the reason beside it
        'cancelled'    -- skipped by the user
    )),
    reason           text CONSTRAINT deliveries_reason_known CHECK (reason IN ('below_severity',
                     'preference_off', 'no_address', 'unsubscribed', 'already_read')),
    redacted         boolean NOT NULL DEFAULT false,  -- its text looked like a secret
    last_error       text,
    sent_at          timestamptz,
    CONSTRAINT deliveries_pkey PRIMARY KEY (user_id, notification_id, channel, target),
    CONSTRAINT deliveries_notification FOREIGN KEY (user_id, notification_id)
        REFERENCES notifications (user_id, id) ON DELETE CASCADE
) WITH (fillfactor = 50);
COMMENT ON TABLE deliveries IS 'every channel and target considered for a notification';
CREATE INDEX IF NOT EXISTS deliveries_message ON deliveries (user_id, message_id)
    WHERE message_id IS NOT NULL;       -- serves: claim_messages, finish_messages, list_outbox
CREATE INDEX IF NOT EXISTS deliveries_id ON deliveries (id);
    -- serves: list_deliveries, retry_delivery

CREATE TABLE IF NOT EXISTS rate_limits (
    user_id  text NOT NULL,             -- empty for a webhook endpoint, which serves all users
    lane     text NOT NULL,             -- the channel, or the channel with ' critical'
    target   uuid NOT NULL,             -- the webhook endpoint; all zeros otherwise
    minute   timestamptz NOT NULL,
    used     integer NOT NULL,          -- asked for since minute; may reach beyond it (webhook)
    CONSTRAINT rate_limits_pkey PRIMARY KEY (user_id, lane, target)
);
COMMENT ON TABLE rate_limits IS 'one counter a lane, started anew with each minute';

CREATE TABLE IF NOT EXISTS suppressions (
    user_id     text NOT NULL,
    channel     text NOT NULL,
    address     text NOT NULL DEFAULT '',  -- the bouncing address; empty when unsubscribed
    reason      text NOT NULL CONSTRAINT suppressions_reason_known
                CHECK (reason IN ('unsubscribed', 'bounced')),
    hits        integer NOT NULL DEFAULT 1,  -- a bounced address is dead at its second hit
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT suppressions_pkey PRIMARY KEY (user_id, channel, reason)
);
COMMENT ON TABLE suppressions IS 'why a user is not written to although a channel is on';

CREATE TABLE IF NOT EXISTS breakers (
    provider      text NOT NULL CONSTRAINT breakers_pkey PRIMARY KEY,
    faults        integer NOT NULL DEFAULT 0,  -- in a row
    paused_until  timestamptz           -- when the next probe may go; NULL: not paused
);
COMMENT ON TABLE breakers IS 'providers that failed lately';

CREATE TABLE IF NOT EXISTS api_keys (
    id            uuid NOT NULL DEFAULT gen_random_uuid() CONSTRAINT api_keys_pkey PRIMARY KEY,
    name          text NOT NULL,
    scope         text NOT NULL CONSTRAINT api_keys_scope_known CHECK (scope IN ('send', 'admin')),
    hash          bytea NOT NULL CONSTRAINT api_keys_hash_key UNIQUE,  -- serves: get_api_key
    created_at    timestamptz NOT NULL DEFAULT now(),
    last_used_at  timestamptz,
    revoked_at    timestamptz
);
COMMENT ON TABLE api_keys IS 'programs that may call; the secret itself is not here';

CREATE TABLE IF NOT EXISTS intake (
    id          uuid NOT NULL DEFAULT gen_random_uuid() CONSTRAINT intake_pkey PRIMARY KEY,
    payload     jsonb NOT NULL,         -- a body of POST /api/notifications with user_id
    due_at      timestamptz NOT NULL DEFAULT now(),
    error       text,                   -- why it could not be stored; it stays here
    created_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE intake IS 'INSERT INTO intake (payload, due_at) inside your own transaction';
CREATE INDEX IF NOT EXISTS intake_due ON intake (due_at) WHERE error IS NULL;
    -- serves: list_due_intake
CREATE INDEX IF NOT EXISTS intake_reader  -- hash: it holds whatever length
    ON intake USING hash (coalesce(payload ->> 'user_id', payload ->> 'userId'));
    -- serves: delete_user, get_export

-- Upgrades: dated statements that bring an older release's tables up to what is written above; the views
-- below stand on them.
-- 2026-11-22: what is critical goes first; what waits is no longer counted, it asks for a token again,
-- and a webhook holds that of the minute it waits for.
DROP INDEX IF EXISTS outbox_due, outbox_waiting, outbox_digests;
UPDATE outbox
SET token_minute = date_trunc('minute', available_at)
WHERE channel = 'webhook' AND state = 'open' AND available_at > now()
  AND token_minute < date_trunc('minute', available_at);
-- 2026-11-22: a language that was not chosen is told from English.
ALTER TABLE notification_preferences ALTER COLUMN locale DROP NOT NULL, ALTER COLUMN locale DROP DEFAULT;
-- 2026-11-21: the outbox leaves room for the two versions that follow.
ALTER TABLE outbox SET (fillfactor = 40);
-- 2026-11-21: a browser's endpoint is unique, by another index.
DROP INDEX IF EXISTS push_subscriptions_endpoint;
-- 2026-11-21: what is archived but not read can be settled too; a payload may name its user in camelCase.
DROP INDEX IF EXISTS notifications_subject, intake_user;
-- 2026-11-21: an endpoint has as many old secrets as it was given new ones in a day.
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('webhook_endpoints')
                                          AND attname = 'old_secret' AND NOT attisdropped) THEN
        ALTER TABLE webhook_endpoints ADD COLUMN old_secrets jsonb NOT NULL DEFAULT '[]';
        UPDATE webhook_endpoints
        SET old_secrets = jsonb_build_array(jsonb_build_object(
            'sealed', encode(old_secret, 'base64'), 'until', old_secret_until))
        WHERE old_secret IS NOT NULL;
        ALTER TABLE webhook_endpoints DROP COLUMN old_secret, DROP COLUMN old_secret_until;
    END IF;
END $$;

-- What holds for a user without a row of choices; the same values as the columns' defaults.
CREATE OR REPLACE VIEW default_preferences AS
SELECT NULL::text AS email, true AS in_app_enabled, false AS email_enabled, false AS push_enabled,
       5 AS digest_minutes, 'warning' AS min_severity, NULL::time AS quiet_from, NULL::time AS quiet_to,
       'UTC' AS timezone, NULL::text AS locale, '{}'::jsonb AS events;

-- A notification as its owner sees it: the columns of the API, in its order.
CREATE OR REPLACE VIEW inbox AS
SELECT id, user_id, event_name, title, body, summary, target_url, severity, data, idempotency_key,
       batch_key, subject_key, read_at, archived_at, created_at, updated_at
FROM notifications;

-- The providers with waiting messages, one index probe each, and until when they rest.
CREATE OR REPLACE VIEW awaited_providers AS
WITH RECURSIVE provider AS (
    SELECT min(provider) AS name FROM outbox WHERE state IN ('open', 'sending', 'pending')
    UNION ALL
    SELECT (SELECT min(o.provider) FROM outbox o
            WHERE o.state IN ('open', 'sending', 'pending') AND o.provider > p.name)
    FROM provider p WHERE p.name IS NOT NULL
)
SELECT p.name, b.paused_until
FROM provider p
LEFT JOIN breakers b ON b.provider = p.name
WHERE p.name IS NOT NULL;

-- The users who are in their quiet hours now, and until when. A wall-clock time that a clock
-- change skips moves to the next valid minute, one that occurs twice takes the first: between the two
-- readings (offset a day before, offset a day after) the earliest instant that has reached it wins.
CREATE OR REPLACE VIEW quiet_users AS
SELECT p.user_id, quiet.ends AS until
FROM notification_preferences p
CROSS JOIN LATERAL (VALUES (-1), (0)) AS night (days)
CROSS JOIN LATERAL (
    SELECT min(instant) FILTER (WHERE edge.name = 'from') AS begins,
           min(instant) FILTER (WHERE edge.name = 'to') AS ends
    FROM (VALUES ('from', p.quiet_from, 0), ('to', p.quiet_to, (p.quiet_to <= p.quiet_from)::int))
             AS edge (name, clock, days)
    CROSS JOIN LATERAL (
        SELECT (now() AT TIME ZONE p.timezone)::date + night.days + edge.days + edge.clock AS clock
    ) wall
    CROSS JOIN LATERAL (
        SELECT (wall.clock - interval '24 hours') AT TIME ZONE p.timezone + interval '24 hours' AS before,
               (wall.clock + interval '24 hours') AT TIME ZONE p.timezone - interval '24 hours' AS after
    ) reading
    CROSS JOIN LATERAL generate_series(least(reading.before, reading.after),
                                       greatest(reading.before, reading.after), interval '1 minute') AS instant
    WHERE instant AT TIME ZONE p.timezone >= wall.clock
) quiet
WHERE p.quiet_from <> p.quiet_to AND quiet.begins <= now() AND now() < quiet.ends;

-- Where an endpoint is and what signs for it: its secret, and each old one that is still good.
CREATE OR REPLACE VIEW webhook_addresses AS
SELECT w.id, w.disabled_at,
       json_build_object('url', w.url, 'sealed', jsonb_build_array(encode(w.secret, 'base64'))
           || coalesce((SELECT jsonb_agg(old -> 'sealed') FROM jsonb_array_elements(w.old_secrets) AS old
                        WHERE (old ->> 'until')::timestamptz > now()), '[]')) AS address
FROM webhook_endpoints w;

INSERT INTO schema_version (version) VALUES (1) ON CONFLICT (version) DO NOTHING;
