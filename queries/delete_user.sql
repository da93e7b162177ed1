-- changes: inbox
-- Erases everything about a user; deliveries go with their notifications.
WITH gone_notifications AS (DELETE FROM notifications WHERE user_id = %(user_id)s::text),
gone_messages AS (DELETE FROM outbox WHERE user_id = %(user_id)s::text),
gone_preferences AS (DELETE FROM notification_preferences WHERE user_id = %(user_id)s::text),
gone_browsers AS (DELETE FROM push_subscriptions WHERE user_id = %(user_id)s::text),
gone_webhooks AS (DELETE FROM webhook_endpoints WHERE user_id = %(user_id)s::text),
gone_suppressions AS (DELETE FROM suppressions WHERE user_id = %(user_id)s::text),
gone_limits AS (DELETE FROM rate_limits WHERE user_id = %(user_id)s::text),
gone_intake AS (DELETE FROM intake
                WHERE coalesce(payload ->> 'user_id', payload ->> 'userId') = %(user_id)s::text),
left_intake AS (UPDATE intake SET payload = payload - '{user_ids,userIds}'::text[] || jsonb_build_object('user_ids',
                           coalesce(payload -> 'user_ids', payload -> 'userIds') - %(user_id)s::text)
                WHERE coalesce(payload -> 'user_ids', payload -> 'userIds') @> to_jsonb(ARRAY[%(user_id)s::text]))
SELECT %(user_id)s::text AS user_id
