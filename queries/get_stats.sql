-- The state of everything that leaves: counts, the age of the oldest due message, breakers, an hour.
SELECT coalesce((SELECT json_agg(json_build_object('channel', c.channel, 'status', c.status, 'n', c.n))
                 FROM (SELECT channel, status, count(*) AS n FROM deliveries GROUP BY channel, status
                       ORDER BY channel, status) c), '[]'::json) AS counts,
       (SELECT extract(epoch FROM now() - min(available_at))::float8 FROM outbox
        WHERE state IN ('open', 'pending', 'sending') AND available_at <= now()) AS oldest_due_seconds,
       coalesce((SELECT json_agg(json_build_object('provider', provider, 'faults', faults, 'paused_until', paused_until)
                                 ORDER BY provider) FROM breakers), '[]'::json) AS breakers,
       (SELECT json_agg(json_build_object('minute', m.minute, 'sent', coalesce(o.sent, 0),
                                          'failed', coalesce(o.failed, 0)) ORDER BY m.minute)
        FROM generate_series(date_trunc('minute', now()) - interval '59 minutes', now(), interval '1 minute') AS m (minute)
        LEFT JOIN (SELECT date_trunc('minute', finished_at) AS minute,
                          count(*) FILTER (WHERE state = 'sent') AS sent,
                          count(*) FILTER (WHERE state = 'failed') AS failed
                   FROM outbox WHERE finished_at > now() - interval '61 minutes' GROUP BY 1) o
               ON o.minute = m.minute) AS per_minute
