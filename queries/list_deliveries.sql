-- A page of all users' deliveries, newest first, for admins.
WITH page AS MATERIALIZED (
    SELECT d.id, d.user_id, d.notification_id, d.channel, nullif(d.target, %(no_target)s::uuid) AS target,
           d.message_id, d.status, d.reason, coalesce(o.attempts, 0) AS attempts,
           CASE WHEN d.status = 'queued' THEN o.available_at END AS available_at, d.sent_at,
           coalesce(d.last_error, CASE WHEN d.status = 'queued' THEN o.last_error END) AS last_error,
           d.redacted, row_number() OVER (ORDER BY d.id DESC) AS place
    FROM deliveries d
    LEFT JOIN outbox o ON o.user_id = d.user_id AND o.id = d.message_id
    WHERE (%(status)s::text IS NULL OR d.status = %(status)s::text)
      AND (%(channel)s::text IS NULL OR d.channel = %(channel)s::text)
      AND (%(about)s::text IS NULL OR d.user_id = %(about)s::text)
      AND (%(cursor)s::uuid IS NULL OR d.id < %(cursor)s::uuid)
    ORDER BY d.id DESC
    LIMIT %(limit)s::int + 1
)
SELECT coalesce(json_agg(to_jsonb(page) - 'place' ORDER BY id DESC) FILTER (WHERE place <= %(limit)s::int),
                '[]'::json) AS deliveries,
       CASE WHEN count(*) > %(limit)s::int
            THEN (max(id::text) FILTER (WHERE place = %(limit)s::int))::uuid END AS next_cursor
FROM page
