-- A message due again that ended its worker before: it is to run alone.
SELECT id FROM outbox
WHERE crashes >= 2  -- as the index outbox_suspects has it
  AND crashes + (state = 'sending')::int >= 3
  AND state IN ('open', 'sending', 'pending') AND available_at <= now()
LIMIT 1
