-- The events this user has been told of lately, by name.
SELECT coalesce(json_agg(event_name ORDER BY event_name), '[]'::json) AS events
FROM (
    SELECT DISTINCT event_name
    FROM (SELECT event_name FROM notifications WHERE user_id = %(user_id)s::text ORDER BY id DESC LIMIT 1000) lately
    LIMIT 100
) names
