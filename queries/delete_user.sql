-- Erases everything about a user; deliveries go with their notifications.
WITH gone_notifications AS (DELETE FROM notifications WHERE user_id = %(user_id)s::text),
gone_messages AS (DELETE FROM outbox WHERE user_id = %(user_id)s::text),
gone_preferences AS (DELETE FROM notification_preferences WHERE user_id = %(user_id)s::text),
gone_browsers AS (DELETE FROM push_subscriptions WHERE user_id = %(user_id)s::text),
gone_webhooks AS (DELETE FROM webhook_endpoints WHERE user_id = %(user_id)s::text),
gone_suppressions AS (DELETE FROM suppressions WHERE user_id = %(user_id)s::text),
gone_limits AS (DELETE FROM rate_limits WHERE user_id = %(user_id)s::text),
-- What waits for this user alone goes; from what waits for others too the name goes.
waiting AS (
    SELECT i.id, coalesce(i.payload ->> 'user_id', i.payload ->> 'userId') = %(user_id)s::text AS own, listed.users
    FROM intake i
    CROSS JOIN LATERAL (SELECT coalesce(i.payload -> 'user_ids', i.payload -> 'userIds') AS users) listed
    WHERE coalesce(i.payload ->> 'user_id', i.payload ->> 'userId') = %(user_id)s::text
       OR listed.users @> to_jsonb(ARRAY[%(user_id)s::text])
),
gone_intake AS (DELETE FROM intake WHERE id IN (
    SELECT w.id FROM waiting w WHERE w.own OR w.users <@ to_jsonb(ARRAY[%(user_id)s::text]))),
left_intake AS (
    UPDATE intake i
    SET payload = i.payload - '{user_ids,userIds}'::text[]
                  || jsonb_build_object('user_ids', w.users - %(user_id)s::text)
    FROM waiting w
    WHERE i.id = w.id AND w.own IS NOT TRUE AND NOT w.users <@ to_jsonb(ARRAY[%(user_id)s::text])
)
SELECT ARRAY[%(user_id)s::text] AS changed
