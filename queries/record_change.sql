-- Tells the other processes whose inboxes changed; a lost word costs them a moment, never a message.
SELECT pg_notify('bellhop', %(users)s::text)
