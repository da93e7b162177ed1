-- Forgets finished messages older than the retention with their deliveries, a bounded number at a time.
WITH old AS MATERIALIZED (
    SELECT user_id, id FROM outbox
    WHERE %(days)s::int > 0 AND finished_at < now() - %(days)s::int * interval '1 day'
    LIMIT %(room)s::int
),
told AS (
    DELETE FROM deliveries d USING old WHERE d.user_id = old.user_id AND d.message_id = old.id
)
DELETE FROM outbox o USING old WHERE o.user_id = old.user_id AND o.id = old.id
