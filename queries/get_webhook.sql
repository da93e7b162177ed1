-- Where an endpoint is and what signs for it, for a ping.
SELECT to_jsonb(url) AS url, jsonb_build_array(encode(secret, 'base64'),
                              CASE WHEN old_secret_until > now() THEN encode(old_secret, 'base64') END) AS sealed
FROM webhook_endpoints WHERE id = %(id)s::uuid
