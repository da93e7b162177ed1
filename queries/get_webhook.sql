-- The ping of an endpoint, with the columns of claim_messages: the fields of a Line, then of Outgoing.
SELECT ping.id, NULL::text, 'bellhop.ping', 'info', now(),
       '', ping.id, 0, 'webhook', '', 'en', now(), w.address, 1, 'bellhop.ping', NULL::json
FROM webhook_addresses w CROSS JOIN (SELECT gen_random_uuid() AS id) AS ping
WHERE w.id = %(id)s::uuid
