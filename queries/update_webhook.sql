-- Changes of an endpoint what is given; enabled switches it on or off.
UPDATE webhook_endpoints w
SET url = coalesce(p.url, w.url),
    host = coalesce(lower(substring(p.url FROM '^[^/]*//([^/?#]+)')), w.host),
    events = coalesce(p.events, w.events),
    min_severity = coalesce(p.min_severity, w.min_severity),
    user_id = CASE WHEN %(patch)s::jsonb ? 'user_id' THEN p.user_id ELSE w.user_id END,
    disabled_at = CASE WHEN p.enabled THEN NULL WHEN NOT p.enabled THEN coalesce(w.disabled_at, now())
                       ELSE w.disabled_at END
FROM jsonb_to_record(%(patch)s::jsonb) AS p (url text, events text[], min_severity text, user_id text, enabled boolean)
WHERE w.id = %(id)s::uuid
RETURNING json_build_object(
    'id', w.id, 'url', w.url, 'events', w.events, 'min_severity', w.min_severity, 'user_id', w.user_id,
    'enabled', w.disabled_at IS NULL, 'disabled_at', w.disabled_at, 'created_at', w.created_at) AS webhook
