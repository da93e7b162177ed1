-- A user's choices and contact, defaults where nothing was chosen.
SELECT u.user_id, p.email, p.timezone, p.locale,
       json_build_object(
           'in_app_enabled', p.in_app_enabled, 'email_enabled', p.email_enabled,
           'push_enabled', p.push_enabled, 'digest_minutes', p.digest_minutes,
           'min_severity', p.min_severity, 'quiet_from', to_char(p.quiet_from, 'HH24:MI'),
           'quiet_to', to_char(p.quiet_to, 'HH24:MI'), 'timezone', p.timezone, 'locale', p.locale,
           'events', p.events) AS preferences
FROM (VALUES (%(user_id)s::text)) AS u (user_id)
CROSS JOIN LATERAL (
    SELECT email, in_app_enabled, email_enabled, push_enabled, digest_minutes, min_severity,
           quiet_from, quiet_to, timezone, coalesce(locale, 'en') AS locale, events
    FROM notification_preferences c WHERE c.user_id = u.user_id
    UNION ALL
    SELECT email, in_app_enabled, email_enabled, push_enabled, digest_minutes, min_severity,
           quiet_from, quiet_to, timezone, 'en', events
    FROM default_preferences
    LIMIT 1
) p
