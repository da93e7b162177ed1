-- Marks one notification read or unread, archives or restores it; the first read_at is kept.
-- NULL leaves a state alone. The count adds the changed row to the others: it sees the old ones.
WITH changed AS (
    UPDATE inbox n
    SET read_at = CASE WHEN %(read)s::boolean THEN coalesce(n.read_at, now())
                       WHEN NOT %(read)s::boolean THEN NULL ELSE n.read_at END,
        archived_at = CASE WHEN %(archived)s::boolean THEN coalesce(n.archived_at, now())
                           WHEN NOT %(archived)s::boolean THEN NULL ELSE n.archived_at END,
        updated_at = now()
    WHERE n.user_id = %(user_id)s::text AND n.id = %(id)s::uuid
    RETURNING n.id, n.read_at, n.archived_at, to_json(n) AS notification
)
SELECT c.notification,
       (SELECT count(*) FROM notifications
        WHERE user_id = %(user_id)s::text AND read_at IS NULL AND archived_at IS NULL AND id <> c.id)
       + (c.read_at IS NULL AND c.archived_at IS NULL)::int AS unread_count,
       ARRAY[%(user_id)s::text] AS changed
FROM changed c
