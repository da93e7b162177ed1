-- The subject is settled, for every user: its notifications become read and archived and leave
-- every message that has not been claimed. One row a notification.
WITH settled AS (
    UPDATE notifications
    SET read_at = coalesce(read_at, now()), archived_at = now(), updated_at = now()
    WHERE subject_key = %(subject_key)s::text AND archived_at IS NULL
    RETURNING user_id, id
),
dropped AS (
    UPDATE deliveries d
    SET status = 'suppressed', reason = 'already_read'
    FROM settled s, outbox o
    WHERE d.user_id = s.user_id AND d.notification_id = s.id AND d.status = 'queued'
      AND o.user_id = d.user_id AND o.id = d.message_id AND o.state IN ('open', 'pending')
)
SELECT user_id FROM settled
