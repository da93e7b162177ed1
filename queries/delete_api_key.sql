-- Revokes a key; no row when there is none with this id.
UPDATE api_keys SET revoked_at = now() WHERE id = %(id)s::uuid AND revoked_at IS NULL RETURNING id
