-- A page of an inbox for each item asked for: newest first, the unread count, the next page's cursor.
SELECT json_build_object('notifications', l.notifications, 'unread_count', l.unread_count,
                         'next_cursor', l.next_cursor) AS answer
FROM ROWS FROM (jsonb_to_recordset(%(items)s::jsonb) AS (
    user_id text, cursor uuid, archived boolean, unread boolean, event text, "limit" int)) WITH ORDINALITY
    AS i (user_id, cursor, archived, unread, event, "limit", turn)
CROSS JOIN LATERAL (
    SELECT coalesce(json_agg(page.notification ORDER BY page.id DESC) FILTER (WHERE page.place <= i."limit"),
                    '[]'::json) AS notifications,
           (SELECT count(*) FROM notifications u
            WHERE u.user_id = i.user_id AND u.read_at IS NULL AND u.archived_at IS NULL) AS unread_count,
           CASE WHEN count(*) > i."limit"
                THEN (max(page.id::text) FILTER (WHERE page.place = i."limit"))::uuid END AS next_cursor
    FROM (
        -- One more than asked for: it tells whether there is a next page.
        SELECT n AS notification, n.id, row_number() OVER (ORDER BY n.id DESC) AS place
        FROM inbox n
        WHERE n.user_id = i.user_id
          AND (i.cursor IS NULL OR n.id < i.cursor)
          AND (n.archived_at IS NOT NULL) = i.archived
          AND (NOT i.unread OR n.read_at IS NULL)
          AND (i.event IS NULL OR i.event IN (n.event_name, '*')
               OR i.event LIKE '%%.*' AND starts_with(n.event_name, left(i.event, -1)))
        ORDER BY n.id DESC
        LIMIT i."limit" + 1
    ) page
) l
ORDER BY i.turn
