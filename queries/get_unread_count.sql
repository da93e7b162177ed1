-- How many notifications a user has neither read nor archived.
SELECT count(*) AS unread_count
FROM notifications
WHERE user_id = %(user_id)s::text AND read_at IS NULL AND archived_at IS NULL
