-- Stops e-mail to a user, all of it or one event's; the user alone can ask for it again.
WITH stopped AS (
    INSERT INTO suppressions (user_id, channel, reason)
    SELECT %(user_id)s::text, 'email', 'unsubscribed' WHERE %(event)s::text IS NULL
    ON CONFLICT (user_id, channel, reason) DO NOTHING
)
INSERT INTO notification_preferences AS p (user_id, events)
VALUES (%(user_id)s::text,
        CASE WHEN %(event)s::text IS NULL THEN '{}' ELSE
             jsonb_build_object(%(event)s::text, '{"email": false}'::jsonb) END)
ON CONFLICT (user_id) DO UPDATE
SET email_enabled = p.email_enabled AND %(event)s::text IS NOT NULL,
    events = CASE WHEN %(event)s::text IS NULL THEN p.events ELSE
                  p.events || jsonb_build_object(%(event)s::text, coalesce(p.events -> %(event)s::text, '{}')
                                                                  || '{"email": false}') END
