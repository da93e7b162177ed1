-- Merges a JSON patch into a user's choices and contact: absent keeps, null empties; in events,
-- null removes a pattern or a channel of it. The user's own wish for e-mail ends an unsubscription and
-- forgives an address its bounces.
WITH wanted_again AS (
    DELETE FROM suppressions
    WHERE user_id = %(user_id)s::text AND channel = 'email'
      AND %(by_user)s::boolean AND %(patch)s::jsonb -> 'email_enabled' = 'true'
),
-- Merged in the update itself, so into the first row that another request has just added as well.
saved AS (
    INSERT INTO notification_preferences AS p (
        user_id, email, in_app_enabled, email_enabled, push_enabled, digest_minutes, min_severity,
        quiet_from, quiet_to, timezone, locale, events)
    SELECT %(user_id)s::text, r.email, r.in_app_enabled, r.email_enabled, r.push_enabled, r.digest_minutes,
           r.min_severity, r.quiet_from, r.quiet_to, r.timezone, r.locale, wish.events
    FROM default_preferences d
    CROSS JOIN LATERAL jsonb_populate_record(d, %(patch)s::jsonb) r
    CROSS JOIN (
        SELECT coalesce(jsonb_object_agg(pattern, channels), '{}') AS events
        FROM jsonb_each(jsonb_strip_nulls(%(patch)s::jsonb -> 'events')) AS wish (pattern, channels)
        WHERE channels <> '{}'
    ) wish
    ON CONFLICT (user_id) DO UPDATE
    SET (email, in_app_enabled, email_enabled, push_enabled, digest_minutes, min_severity,
         quiet_from, quiet_to, timezone, locale, events) = (
        SELECT r.email, r.in_app_enabled, r.email_enabled, r.push_enabled, r.digest_minutes,
               r.min_severity, r.quiet_from, r.quiet_to, r.timezone, r.locale, merged.events
        FROM jsonb_populate_record(p, %(patch)s::jsonb) r
        CROSS JOIN (
            SELECT coalesce(jsonb_object_agg(pattern, channels) FILTER (WHERE channels <> '{}'), '{}') AS events
            FROM (
                SELECT pattern,
                       CASE WHEN wish.channels IS NULL THEN old.channels
                            WHEN wish.channels <> 'null'
                            THEN jsonb_strip_nulls(coalesce(old.channels, '{}') || wish.channels)
                       END AS channels
                FROM jsonb_each(p.events) AS old (pattern, channels)
                FULL JOIN jsonb_each(coalesce(%(patch)s::jsonb -> 'events', '{}'))
                    AS wish (pattern, channels) USING (pattern)
            ) each_pattern
        ) merged
    )
    RETURNING p.user_id, p.email, p.in_app_enabled, p.email_enabled, p.push_enabled, p.digest_minutes,
              p.min_severity, p.quiet_from, p.quiet_to, p.timezone, coalesce(p.locale, 'en') AS locale, p.events
),
-- What waits for the end of a night that is another now; update_due_messages lets it leave or holds it anew.
woken AS (
    UPDATE outbox o
    SET available_at = now()
    FROM saved s
    WHERE %(patch)s::jsonb ?| '{quiet_from,quiet_to,timezone}'
      AND o.user_id = s.user_id AND o.token_minute IS NULL
      AND (o.state = 'open' AND o.digest = 'quiet' OR o.state = 'pending')
)
SELECT user_id, email, timezone, locale,
       json_build_object(
           'in_app_enabled', in_app_enabled, 'email_enabled', email_enabled,
           'push_enabled', push_enabled, 'digest_minutes', digest_minutes,
           'min_severity', min_severity, 'quiet_from', to_char(quiet_from, 'HH24:MI'),
           'quiet_to', to_char(quiet_to, 'HH24:MI'), 'timezone', timezone, 'locale', locale,
           'events', events) AS preferences
FROM saved
