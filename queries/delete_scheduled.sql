-- Cancels a notification kept for later; no row once it is gone.
DELETE FROM intake WHERE id = %(id)s::uuid RETURNING id
