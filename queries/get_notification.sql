-- One notification of this user with what became of it on every channel.
SELECT to_json(n) AS notification,
       coalesce((
           SELECT json_agg(timeline ORDER BY timeline.channel, timeline.target)
           FROM (SELECT d.channel, nullif(d.target, %(no_target)s::uuid) AS target, d.status, d.reason,
                        coalesce(o.attempts, 0) AS attempts,
                        CASE WHEN d.status = 'queued' THEN o.available_at END AS available_at, d.sent_at,
                        CASE WHEN %(for_admin)s::boolean
                             THEN coalesce(d.last_error, CASE WHEN d.status = 'queued' THEN o.last_error END)
                        END AS last_error, d.redacted
                 FROM deliveries d
                 LEFT JOIN outbox o ON o.user_id = d.user_id AND o.id = d.message_id
                 WHERE d.user_id = n.user_id AND d.notification_id = n.id) AS timeline
       ), '[]'::json) AS deliveries
FROM inbox n
WHERE n.user_id = %(user_id)s::text AND n.id = %(id)s::uuid
