-- Skips a waiting message: its items become cancelled; no row when it has left already. A batch that begins later is
-- another one; what joins an overflow or quiet digest leaves without these. Written in the outbox too, so that a
-- claim that began before notices it.
WITH waiting AS (
    UPDATE outbox o
    SET state = CASE WHEN o.digest IS NULL THEN 'void' ELSE o.state END,
        finished_at = CASE WHEN o.digest IS NULL THEN now() END,
        digest = CASE WHEN o.digest LIKE 'key:%%' THEN 'skipped:' || o.id ELSE o.digest END
    WHERE o.user_id = %(user_id)s::text AND o.id = %(id)s::uuid AND o.state IN ('open', 'pending')
    RETURNING o.id
),
cancelled AS (
    UPDATE deliveries d
    SET status = 'cancelled'
    FROM waiting w
    WHERE d.user_id = %(user_id)s::text AND d.message_id = w.id AND d.status = 'queued'
    RETURNING d.message_id
)
SELECT w.id FROM waiting w WHERE EXISTS (SELECT FROM cancelled)
