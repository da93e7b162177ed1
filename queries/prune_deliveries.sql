-- Forgets old deliveries that were suppressed at once and so have no message to go with, a bounded number
-- at a time. Their ids are time-ordered: the first 48 bits are milliseconds, of which none are before 1970.
DELETE FROM deliveries
WHERE %(days)s::int > 0 AND id IN (
    SELECT id FROM deliveries
    WHERE message_id IS NULL AND status <> 'queued'
      AND id < (lpad(to_hex(greatest(0, extract(epoch FROM now() - %(days)s::int * interval '1 day') * 1000)::bigint),
                     12, '0') || repeat('0', 20))::uuid
    LIMIT %(room)s::int)
