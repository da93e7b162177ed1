\set reader random(1, 100000)
INSERT INTO notifications (user_id, id, event_name, title, body, severity)
VALUES ('user-' || :reader, NEW_ID, 'comment.created', 'A comment on your post', 'It was worth reading, thank you.', 'info')
