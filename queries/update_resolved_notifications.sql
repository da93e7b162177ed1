-- Settles a subject, for every user: its notifications become read and archived and leave every message
-- that has not been claimed.
WITH settled AS (
    UPDATE notifications
    SET read_at = coalesce(read_at, now()), archived_at = coalesce(archived_at, now()), updated_at = now()
    WHERE subject_key = %(subject_key)s::text AND (read_at IS NULL OR archived_at IS NULL)
    RETURNING user_id, id
),
-- Locked, so that none of them is claimed meanwhile; in the order in which creates lock what they join. IS TRUE keeps
-- the partial indexes of all that waits, and below a loop over it, out of the plan: a subject may be a broadcast's.
waiting AS MATERIALIZED (
    SELECT o.user_id, o.id
    FROM outbox o
    WHERE (o.state IN ('open', 'pending')) IS TRUE
      AND (o.user_id, o.id) IN (
          SELECT d.user_id, d.message_id FROM deliveries d
          JOIN settled s ON s.user_id = d.user_id AND s.id = d.notification_id AND d.status = 'queued')
    ORDER BY o.user_id, o.channel, o.target, o.digest, o.id
    FOR UPDATE
),
-- As in delete_outbox_message: a claim that began before notices what is written here.
emptied AS (
    UPDATE outbox o
    SET state = CASE WHEN o.digest IS NULL THEN 'void' ELSE o.state END,
        finished_at = CASE WHEN o.digest IS NULL THEN now() END
    FROM waiting w WHERE o.user_id = w.user_id AND o.id = w.id
),
dropped AS (
    UPDATE deliveries d
    SET status = 'suppressed', reason = 'already_read'
    FROM settled s
    WHERE d.user_id = s.user_id AND d.notification_id = s.id AND d.status = 'queued'
      AND ((d.user_id, d.message_id) IN (SELECT w.user_id, w.id FROM waiting w)) IS TRUE
)
SELECT count(*) AS resolved, coalesce(array_agg(DISTINCT user_id), '{}') AS changed FROM settled
