-- Keeps a notification for later; the worker stores it when due.
INSERT INTO intake (payload, due_at)
VALUES (%(payload)s::jsonb, %(due_at)s::timestamptz)
RETURNING json_build_object('id', id, 'due_at', due_at) AS scheduled
