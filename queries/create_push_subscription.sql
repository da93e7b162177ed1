-- Registers a browser for the caller: 201, or 200 when its endpoint is known already and renewed. Another
-- user's moves here as a new one: one browser, one reader, however many ask at once.
WITH asked AS MATERIALIZED (
    SELECT %(user_id)s::text AS user_id, gen_random_uuid() AS id, wish ->> 'endpoint' AS endpoint,
           lower(substring(wish ->> 'endpoint' FROM '^[^/]*//([^/?#]+)')) AS host,
           wish -> 'keys' ->> 'p256dh' AS p256dh, wish -> 'keys' ->> 'auth' AS auth
    FROM (SELECT %(patch)s::jsonb AS wish) given
)
INSERT INTO push_subscriptions AS s (user_id, id, endpoint, host, p256dh, auth)
SELECT user_id, id, endpoint, host, p256dh, auth FROM asked
ON CONFLICT (md5(endpoint)) DO UPDATE
SET user_id = EXCLUDED.user_id, p256dh = EXCLUDED.p256dh, auth = EXCLUDED.auth,
    id = CASE WHEN s.user_id = EXCLUDED.user_id THEN s.id ELSE EXCLUDED.id END
RETURNING s.id, CASE WHEN s.id = (SELECT asked.id FROM asked) THEN 201 ELSE 200 END AS status
