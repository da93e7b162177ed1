-- How a connection speaks: times in UTC, text in UTF-8, whatever the server's. No transaction is left open long,
-- and a lock is waited for less long than a connection: who waits for one is let in when another gives up.
-- A claim takes 3 ms to plan and 1 ms to run, and its cost on paper would have it compiled each time.
SELECT set_config('timezone', 'UTC', false), set_config('client_encoding', 'UTF8', false),
       set_config('application_name', 'bellhop', false), set_config('plan_cache_mode', 'force_generic_plan', false),
       set_config('jit', 'off', false), set_config('idle_in_transaction_session_timeout', '60s', false),
       set_config('lock_timeout', '1500ms', false)
