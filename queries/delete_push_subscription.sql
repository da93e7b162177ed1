-- Forgets a browser of this user.
DELETE FROM push_subscriptions
WHERE user_id = %(user_id)s::text AND md5(endpoint) = md5(%(endpoint)s::text)
  AND endpoint = %(endpoint)s::text
