-- How many processes of this service listen on this database.
SELECT count(*) AS listeners
FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'bellhop live'
