-- Forgets what was stored as a notification.
DELETE FROM intake WHERE id = %(id)s::uuid
