-- Where an endpoint is and what signs for it, for a ping.
SELECT address FROM webhook_addresses WHERE id = %(id)s::uuid
