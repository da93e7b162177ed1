-- Forgets read or archived notifications older than the retention, a bounded number at a time. Those
-- that wait to leave stay.
DELETE FROM notifications n
USING (
    SELECT o.user_id, o.id
    FROM notifications o
    WHERE %(days)s::int > 0 AND o.created_at < now() - %(days)s::int * interval '1 day'
      AND (o.read_at IS NOT NULL OR o.archived_at IS NOT NULL)
      AND NOT EXISTS (SELECT FROM deliveries d WHERE d.user_id = o.user_id AND d.notification_id = o.id
                                                 AND d.status = 'queued')
    LIMIT %(room)s::int
) old
WHERE n.user_id = old.user_id AND n.id = old.id
