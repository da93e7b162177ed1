-- Gives an endpoint a new signing secret; each old one still signs for 24 hours.
UPDATE webhook_endpoints w
SET secret = %(secret)s::bytea,
    old_secrets = jsonb_build_object('sealed', encode(w.secret, 'base64'), 'until', now() + interval '24 hours')
                  || coalesce((SELECT jsonb_agg(old) FROM jsonb_array_elements(w.old_secrets) AS old
                               WHERE (old ->> 'until')::timestamptz > now()), '[]')
WHERE w.id = %(id)s::uuid
RETURNING w.id
