-- Marks a user's notifications read, up to and including one of them; no row when it is not theirs.
WITH bound AS (
    SELECT WHERE %(before)s::uuid IS NULL
    UNION ALL
    SELECT FROM notifications WHERE user_id = %(user_id)s::text AND id = %(before)s::uuid
),
marked AS (
    UPDATE notifications
    SET read_at = now(), updated_at = now()
    WHERE user_id = %(user_id)s::text AND read_at IS NULL AND archived_at IS NULL
      AND (%(before)s::uuid IS NULL OR id <= %(before)s::uuid) AND EXISTS (SELECT FROM bound)
    RETURNING id
)
SELECT (SELECT count(*) FROM marked) AS updated,
       (SELECT count(*) FROM notifications
        WHERE user_id = %(user_id)s::text AND read_at IS NULL AND archived_at IS NULL
          AND id > %(before)s::uuid) AS unread_count,
       ARRAY[%(user_id)s::text] AS changed
FROM bound
