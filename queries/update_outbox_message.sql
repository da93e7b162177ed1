-- Sends a waiting message now; no row when it is not this user's or has left already.
UPDATE outbox
SET available_at = now()
WHERE user_id = %(user_id)s::text AND id = %(id)s::uuid AND state IN ('open', 'pending')
RETURNING id
