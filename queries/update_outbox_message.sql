-- Sends a waiting message now, whatever the hour or the limit; no row when it is not this user's, has
-- left already or has nothing to say.
UPDATE outbox o
SET available_at = now(), critical = true, token_minute = 'infinity'
WHERE o.user_id = %(user_id)s::text AND o.id = %(id)s::uuid AND o.state IN ('open', 'pending')
  AND EXISTS (SELECT FROM deliveries d
              WHERE d.user_id = o.user_id AND d.message_id = o.id AND d.status = 'queued')
RETURNING o.id
