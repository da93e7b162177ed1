-- A user's messages that have not left yet, the next one first; beside them the language the user chose, for the page.
SELECT coalesce(json_agg(message ORDER BY message.available_at, message.id), '[]'::json) AS outbox,
       (SELECT p.locale FROM notification_preferences p WHERE p.user_id = %(user_id)s::text) AS locale
FROM (
    SELECT o.id, o.channel, CASE WHEN o.digest LIKE 'key:%%' THEN substr(o.digest, 5) END AS batch_key,
           (SELECT count(*) FROM deliveries d
            WHERE d.user_id = o.user_id AND d.message_id = o.id AND d.status = 'queued') AS items,
           o.available_at, o.state AS status
    FROM outbox o
    WHERE o.user_id = %(user_id)s::text AND o.state IN ('open', 'pending', 'sending')
) message
WHERE message.items > 0
