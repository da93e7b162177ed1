-- All webhook endpoints, the oldest first; never the secrets.
SELECT coalesce(json_agg(json_build_object(
    'id', id, 'url', url, 'events', events, 'min_severity', min_severity, 'user_id', user_id,
    'enabled', disabled_at IS NULL, 'disabled_at', disabled_at, 'created_at', created_at)
    ORDER BY created_at, id), '[]'::json) AS webhooks
FROM webhook_endpoints
