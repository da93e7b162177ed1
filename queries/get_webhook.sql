-- Where an endpoint is and what signs for it, for a ping.
SELECT to_jsonb(w.url) AS url,
       jsonb_build_array(encode(w.secret, 'base64'))
       || coalesce((SELECT jsonb_agg(old -> 'sealed') FROM jsonb_array_elements(w.old_secrets) AS old
                    WHERE (old ->> 'until')::timestamptz > now()), '[]') AS sealed
FROM webhook_endpoints w WHERE w.id = %(id)s::uuid
