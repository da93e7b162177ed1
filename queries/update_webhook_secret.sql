-- Gives an endpoint a new signing secret; the old one still signs for 24 hours.
UPDATE webhook_endpoints
SET old_secret = secret, old_secret_until = now() + interval '24 hours', secret = %(secret)s::bytea
WHERE id = %(id)s::uuid
RETURNING id
