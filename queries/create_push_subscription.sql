-- Registers a browser for this user; the same endpoint again renews it, another user's moves here:
-- one browser, one reader. The owner is left out of moved on purpose.
WITH asked AS (
    SELECT %(user_id)s::text AS user_id, wish ->> 'endpoint' AS endpoint, wish -> 'keys' ->> 'p256dh' AS p256dh,
           wish -> 'keys' ->> 'auth' AS auth,
           lower(substring(wish ->> 'endpoint' FROM '^[^/]*//([^/?#]+)')) AS host
    FROM (SELECT %(patch)s::jsonb AS wish) given
),
moved AS (
    DELETE FROM push_subscriptions s USING asked a
    WHERE md5(s.endpoint) = md5(a.endpoint) AND s.endpoint = a.endpoint AND s.user_id <> a.user_id
),
renewed AS (
    UPDATE push_subscriptions s
    SET p256dh = a.p256dh, auth = a.auth
    FROM asked a
    WHERE s.user_id = a.user_id AND md5(s.endpoint) = md5(a.endpoint) AND s.endpoint = a.endpoint
    RETURNING s.id
),
added AS (
    INSERT INTO push_subscriptions (user_id, endpoint, host, p256dh, auth)
    SELECT user_id, endpoint, host, p256dh, auth FROM asked WHERE NOT EXISTS (SELECT FROM renewed)
    RETURNING id
)
SELECT id, false AS added FROM renewed
UNION ALL
SELECT id, true FROM added
