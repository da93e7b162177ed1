-- Skips a waiting message: its items become cancelled, and what joins it later leaves without them; no
-- row when it has left already. The message itself stays until it is due, so that nothing is lost.
WITH waiting AS MATERIALIZED (
    SELECT id FROM outbox
    WHERE user_id = %(user_id)s::text AND id = %(id)s::uuid AND state IN ('open', 'pending')
    FOR UPDATE
),
cancelled AS (
    UPDATE deliveries d
    SET status = 'cancelled'
    FROM waiting w
    WHERE d.user_id = %(user_id)s::text AND d.message_id = w.id AND d.status = 'queued'
    RETURNING d.message_id
)
SELECT w.id FROM waiting w WHERE EXISTS (SELECT FROM cancelled)
