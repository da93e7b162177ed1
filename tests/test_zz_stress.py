import random
import threading
import time
from collections import Counter

import httpx
import psycopg


def test_stress(delivering, make_key, sql, mailbox, drain, database):
    services = [delivering(email_per_minute=3), delivering(email_per_minute=3)]
    key = make_key("admin")
    h = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=services[0].url, headers=h) as c:
        for n in range(20):
            c.put(f"/api/users/u{n}", json={"email": f"u{n}@example.org"})
            c.patch(f"/api/users/u{n}/preferences", json={"email_enabled": True})
    codes, stop = Counter(), time.monotonic() + 12
    total = []

    def write(service):
        rnd = random.Random()
        with httpx.Client(base_url=service.url, headers=h, timeout=20) as c:
            while time.monotonic() < stop:
                notes = [
                    {
                        "user_id": f"u{rnd.randrange(20)}",
                        "event_name": "e",
                        "title": "t",
                        "body": "",
                        "severity": "warning",
                        "batch_key": rnd.choice([None, "a", "b", "z"]),
                    }
                    for _ in range(rnd.randrange(1, 20))
                ]
                if rnd.random() < 0.1:
                    r = c.post("/api/notifications/preview", json=notes[0])
                else:
                    r = c.post("/api/notifications/batch", json={"notifications": notes})
                    if r.status_code == 201:
                        total.append(len(notes))
                codes[r.status_code] += 1
                if r.status_code > 299:
                    print(r.text)

    def age():
        with psycopg.connect(database, autocommit=True) as conn:
            while time.monotonic() < stop:
                try:
                    conn.execute(
                        "UPDATE outbox SET available_at = now() WHERE state = 'open' AND available_at > now() AND (user_id, id) IN (SELECT user_id, id FROM outbox WHERE state = 'open' FOR UPDATE SKIP LOCKED)"
                    )
                    conn.execute(
                        "UPDATE rate_limits SET minute = minute - interval '1 minute' WHERE (user_id,lane) IN (SELECT user_id,lane FROM rate_limits FOR UPDATE SKIP LOCKED)"
                    )
                except psycopg.Error as e:
                    codes[type(e).__name__] += 1
                time.sleep(0.1)

    ts = [threading.Thread(target=write, args=(s,)) for s in services for _ in range(3)] + [
        threading.Thread(target=age)
    ]
    [t.start() for t in ts]
    [t.join() for t in ts]
    print(codes, sum(total))
    for _ in range(50):
        sql("UPDATE outbox SET available_at = now() WHERE state IN ('open','pending')")
        sql("UPDATE rate_limits SET minute = minute - interval '1 minute'")
        drain()
        if not sql("SELECT 1 FROM outbox WHERE state IN ('open','pending')"):
            break
    print(
        sql("SELECT status, reason, count(*) FROM deliveries GROUP BY 1,2"),
        sql("SELECT state, count(*) FROM outbox GROUP BY 1"),
    )
    print(sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))
    assert sql("SELECT count(*) FROM deliveries WHERE status = 'sent'") == [(sum(total),)]
    held = dict(sql("SELECT message_id::text, count(*) FROM deliveries GROUP BY 1"))
    for letter in mailbox.messages:
        n = held[str(letter.message["Message-ID"])[1:37]]
        assert letter.subject == ("t" if n == 1 else f"{n} notifications")
