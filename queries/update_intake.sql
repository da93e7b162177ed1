-- Keeps what cannot be stored, with the reason.
UPDATE intake SET error = %(error)s::text WHERE id = %(id)s::uuid AND due_at <= now()
