-- Gives claimed messages back without counting a failure; only the newest claim may.
UPDATE outbox o
SET state = 'pending', available_at = now(), crashes = 0
FROM jsonb_to_recordset(%(results)s::jsonb) AS r (user_id text, id uuid, claim_seq int)
WHERE o.user_id = r.user_id AND o.id = r.id AND o.claim_seq = r.claim_seq AND o.state = 'sending'
