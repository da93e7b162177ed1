-- The language a user chose, if any: without one a page speaks the browser's.
SELECT (SELECT locale FROM notification_preferences WHERE user_id = %(user_id)s::text) AS locale
