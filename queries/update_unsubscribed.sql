-- Stops e-mail to a user, all of it or one event's; the user alone can ask for it again. Who is erased stays so.
WITH changed AS (
    UPDATE notification_preferences p
    SET email_enabled = p.email_enabled AND %(event)s::text IS NOT NULL,
        events = CASE WHEN %(event)s::text IS NULL THEN p.events ELSE
                      p.events || jsonb_build_object(%(event)s::text, coalesce(p.events -> %(event)s::text, '{}')
                                                                      || '{"email": false}') END
    WHERE p.user_id = %(user_id)s::text
    RETURNING p.user_id
)
INSERT INTO suppressions (user_id, channel, reason)
SELECT user_id, 'email', 'unsubscribed' FROM changed WHERE %(event)s::text IS NULL
ON CONFLICT (user_id, channel, reason) DO NOTHING
