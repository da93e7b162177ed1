-- Notifications kept for later that are due now.
SELECT id, payload FROM intake WHERE error IS NULL AND due_at <= now() ORDER BY due_at LIMIT %(room)s::int
