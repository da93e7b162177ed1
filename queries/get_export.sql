-- Everything held about a user, as one document.
SELECT json_build_object(
    'user_id', %(user_id)s::text,
    'preferences', (SELECT to_json(p) FROM notification_preferences p WHERE p.user_id = %(user_id)s::text),
    'notifications', (SELECT coalesce(json_agg(n ORDER BY n.id), '[]'::json)
                      FROM notifications n WHERE n.user_id = %(user_id)s::text),
    'deliveries', (SELECT coalesce(json_agg(d ORDER BY d.id), '[]'::json)
                   FROM deliveries d WHERE d.user_id = %(user_id)s::text),
    'messages', (SELECT coalesce(json_agg(o ORDER BY o.id), '[]'::json)
                 FROM outbox o WHERE o.user_id = %(user_id)s::text),
    'push_subscriptions', (SELECT coalesce(json_agg(s), '[]'::json)
                           FROM push_subscriptions s WHERE s.user_id = %(user_id)s::text),
    'webhooks', (SELECT coalesce(json_agg(json_build_object('id', w.id, 'url', w.url, 'events', w.events)), '[]'::json)
                 FROM webhook_endpoints w WHERE w.user_id = %(user_id)s::text),
    'suppressions', (SELECT coalesce(json_agg(s), '[]'::json)
                     FROM suppressions s WHERE s.user_id = %(user_id)s::text),
    'scheduled', (SELECT coalesce(json_agg(i), '[]'::json)
                  FROM intake i WHERE i.payload ->> 'user_id' = %(user_id)s::text)) AS document
