-- One page of a user's inbox, newest first, with the unread count and the cursor of the next page.
WITH page AS MATERIALIZED (
    -- One more than asked for: it tells whether there is a next page.
    SELECT n AS notification, n.id, row_number() OVER (ORDER BY n.id DESC) AS place
    FROM inbox n
    WHERE n.user_id = %(user_id)s::text
      AND (%(cursor)s::uuid IS NULL OR n.id < %(cursor)s::uuid)
      AND (n.archived_at IS NOT NULL) = %(archived)s::boolean
      AND (NOT %(unread)s::boolean OR n.read_at IS NULL)
      AND (%(event)s::text IS NULL OR n.event_name = %(event)s::text
           OR %(event)s::text LIKE '%%.*' AND starts_with(n.event_name, left(%(event)s::text, -1)))
    ORDER BY n.id DESC
    LIMIT %(limit)s::int + 1
)
SELECT coalesce(json_agg(notification ORDER BY id DESC) FILTER (WHERE place <= %(limit)s::int),
                '[]'::json) AS notifications,
       (SELECT count(*) FROM notifications
        WHERE user_id = %(user_id)s::text AND read_at IS NULL AND archived_at IS NULL) AS unread_count,
       CASE WHEN count(*) > %(limit)s::int
            THEN (max(id::text) FILTER (WHERE place = %(limit)s::int))::uuid END AS next_cursor
FROM page
