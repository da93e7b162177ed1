-- Everything held about a user, as one document; of a list that waits, not who else is on it.
SELECT %(user_id)s::text AS user_id,
    (SELECT to_json(p) FROM notification_preferences p WHERE p.user_id = %(user_id)s::text) AS preferences,
    (SELECT coalesce(json_agg(n ORDER BY n.id), '[]'::json)
     FROM notifications n WHERE n.user_id = %(user_id)s::text) AS notifications,
    (SELECT coalesce(json_agg(d ORDER BY d.id), '[]'::json)
     FROM deliveries d WHERE d.user_id = %(user_id)s::text) AS deliveries,
    (SELECT coalesce(json_agg(o ORDER BY o.id), '[]'::json)
     FROM outbox o WHERE o.user_id = %(user_id)s::text) AS messages,
    (SELECT coalesce(json_agg(s), '[]'::json)
     FROM push_subscriptions s WHERE s.user_id = %(user_id)s::text) AS push_subscriptions,
    (SELECT coalesce(json_agg(to_jsonb(w) - 'secret' - 'old_secrets'), '[]'::json)
     FROM webhook_endpoints w WHERE w.user_id = %(user_id)s::text) AS webhooks,
    (SELECT coalesce(json_agg(s), '[]'::json)
     FROM suppressions s WHERE s.user_id = %(user_id)s::text) AS suppressions,
    (SELECT coalesce(json_agg(r), '[]'::json)
     FROM rate_limits r WHERE r.user_id = %(user_id)s::text) AS rate_limits,
    (SELECT coalesce(json_agg(to_jsonb(i) #- '{payload,user_ids}' #- '{payload,userIds}'), '[]'::json)
     FROM intake i
     WHERE coalesce(i.payload ->> 'user_id', i.payload ->> 'userId') = %(user_id)s::text
        OR coalesce(i.payload -> 'user_ids', i.payload -> 'userIds') @> to_jsonb(ARRAY[%(user_id)s::text])) AS scheduled
