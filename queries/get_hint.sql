-- What the live stream tells: the unread count, and the newest id of all.
SELECT count(*) AS unread_count,
       (SELECT id FROM notifications WHERE user_id = %(user_id)s::text ORDER BY id DESC LIMIT 1) AS newest_id
FROM notifications
WHERE user_id = %(user_id)s::text AND read_at IS NULL AND archived_at IS NULL
