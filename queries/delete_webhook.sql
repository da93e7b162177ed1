-- Forgets an endpoint; what still waits for it fails at its turn.
DELETE FROM webhook_endpoints WHERE id = %(id)s::uuid RETURNING id
