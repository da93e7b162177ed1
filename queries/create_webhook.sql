-- Adds an endpoint; its signing secret is told this once.
INSERT INTO webhook_endpoints AS w (url, host, events, min_severity, user_id, secret)
VALUES (%(url)s::text, lower(substring(%(url)s::text FROM '^[^/]*//([^/?#]+)')), %(events)s::text[],
        %(min_severity)s::text, %(user_id)s::text, %(secret)s::bytea)
RETURNING json_build_object(
    'id', w.id, 'url', w.url, 'events', w.events, 'min_severity', w.min_severity, 'user_id', w.user_id,
    'enabled', w.disabled_at IS NULL, 'disabled_at', w.disabled_at, 'created_at', w.created_at) AS webhook
