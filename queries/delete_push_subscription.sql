-- Forgets a browser of this user; tells how many there were.
WITH gone AS (
    DELETE FROM push_subscriptions
    WHERE user_id = %(user_id)s::text AND md5(endpoint) = md5(%(endpoint)s::text)
      AND endpoint = %(endpoint)s::text
    RETURNING id
)
SELECT count(*) AS gone FROM gone
