-- Registers a browser for this user; the same endpoint again renews it, another user's moves here:
-- one browser, one reader. The owner is left out of moved on purpose.
WITH moved AS (
    DELETE FROM push_subscriptions
    WHERE md5(endpoint) = md5(%(endpoint)s::text) AND endpoint = %(endpoint)s::text
      AND user_id <> %(user_id)s::text
),
renewed AS (
    UPDATE push_subscriptions
    SET p256dh = %(p256dh)s::text, auth = %(auth)s::text
    WHERE user_id = %(user_id)s::text AND md5(endpoint) = md5(%(endpoint)s::text)
      AND endpoint = %(endpoint)s::text
    RETURNING id
),
added AS (
    INSERT INTO push_subscriptions (user_id, endpoint, host, p256dh, auth)
    SELECT %(user_id)s::text, %(endpoint)s::text, %(host)s::text, %(p256dh)s::text, %(auth)s::text
    WHERE NOT EXISTS (SELECT FROM renewed)
    RETURNING id
)
SELECT id, false AS added FROM renewed
UNION ALL
SELECT id, true FROM added
