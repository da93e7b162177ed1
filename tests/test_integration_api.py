"""What programs do for users: contact, export, erase, tokens, settling a subject."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from conftest import SECRET, Running, app, browser, eventually, problem, user_token

Json = dict[str, Any]
Post = Callable[..., Json]
Sql = Callable[..., list[tuple[Any, ...]]]
NOTE = {"user_id": "alice", "event_name": "comment.created", "title": "A comment", "body": "Inside"}


def soon(**ahead: float) -> str:
    return (datetime.now(UTC) + timedelta(**ahead)).isoformat()


# ─── Contact ───


def test_a_contact_is_set_field_by_field(sender: httpx.Client) -> None:
    nobody = sender.get("/api/users/alice").json()
    assert (nobody["user_id"], nobody["email"], nobody["timezone"], nobody["locale"]) == (
        "alice",
        None,
        "UTC",
        "en",
    )
    first = sender.put("/api/users/alice", json={"email": "alice@example.com"})
    assert first.status_code == 200 and first.json()["email"] == "alice@example.com"
    second = sender.put("/api/users/alice", json={"timezone": "Asia/Seoul", "locale": "ko"}).json()
    assert (second["email"], second["timezone"], second["locale"]) == (
        "alice@example.com",
        "Asia/Seoul",
        "ko",
    )
    assert second["preferences"]["timezone"] == "Asia/Seoul"
    assert sender.get("/api/users/alice").json() == second
    assert sender.put("/api/users/alice", json={"email": None}).json()["email"] is None
    assert sender.put("/api/users/alice", json={}).status_code == 200


def test_an_address_that_is_none_is_refused(sender: httpx.Client, contents: Callable[[], Json]) -> None:
    before = contents()
    for wrong in (
        "", "alice", "@example.com", "alice@", "a b@example.com", "a@b@c", "a@example.com\n",
        "a@example.com, b@x.y", "<a@example.com>", "a\r\nBcc: b@x.y", "a@exa mple.com",
        "x" * 250 + "@example.com", "ünï@example.com", "a@exämple.com", 5, True, ["a@b.c"], {},
    ):  # fmt: skip
        problem(sender.put("/api/users/alice", json={"email": wrong}), 400, "email")
    for right in ("a@example.com", "a.b+c@sub.example.com", "a@xn--exmple-cua.com", "a@localhost"):
        assert sender.put("/api/users/bob", json={"email": right}).json()["email"] == right
    sender.delete("/api/users/bob")
    assert contents() == before


def test_user_ids_may_hold_what_urls_must_quote(sender: httpx.Client, sql: Sql) -> None:
    for user, path in (
        ("a b", "a%20b"), ("a@example.com", "a@example.com"), ("é", "%C3%A9"), ("a?b#c", "a%3Fb%23c"),
        ("a+b", "a+b"), ("a%20b", "a%2520b"), ("auth0|1", "auth0%7C1"), ("<script>", "%3Cscript%3E"),
        ("'; --", "'%3B%20--"), ("org/7", "org%2F7"), ("/", "%2f"), ("a/export", "a%2Fexport"),
    ):  # fmt: skip
        reply = sender.put(f"/api/users/{path}", json={"locale": "de"})
        assert reply.status_code == 200 and reply.json()["user_id"] == user
        assert sql("SELECT user_id FROM notification_preferences") == [(user,)]
        assert sender.delete(f"/api/users/{path}").status_code == 204
        assert sql("SELECT user_id FROM notification_preferences") == []


# ─── Export and erase ───


def fill(user: str, sender: httpx.Client, service: Running, client: Any, sql: Sql) -> None:
    """Something of every kind that can be held about a user."""
    sender.put(f"/api/users/{user}", json={"email": f"{user}@example.com"})
    sender.patch(f"/api/users/{user}/preferences", json={"email_enabled": True, "min_severity": "info"})
    own = client(service.url, user_token(user))
    own.post("/api/push/subscriptions", json=browser(f"https://p.example/{user}"))
    for number in range(3):
        assert (
            sender.post(
                "/api/notifications", json=NOTE | {"user_id": user, "batch_key": f"b{number}"}
            ).status_code
            == 201
        )
    later = sender.post("/api/notifications", json=NOTE | {"user_id": user, "deliver_at": soon(hours=1)})
    assert later.status_code == 202
    sql("INSERT INTO suppressions (user_id, channel, reason) VALUES (%s, 'email', 'unsubscribed')", user)


@pytest.fixture
def service(serve: Callable[..., Running]) -> Running:
    """A service that sends nothing, so that what is queued stays."""
    return serve(delivery_concurrency=0)


def test_an_export_holds_everything_about_the_user_and_nobody_else(
    sender: httpx.Client, service: Running, client: Any, sql: Sql
) -> None:
    for user in ("alice", "bob"):
        fill(user, sender, service, client, sql)
        sql("INSERT INTO rate_limits SELECT %s, 'email', gen_random_uuid(), now(), 3", user)
    reply = sender.get("/api/users/alice/export")
    assert reply.status_code == 200
    document = reply.json()
    assert len(document["notifications"]) == 3
    assert [limit["used"] for limit in document["rate_limits"]] == [3]
    text = json.dumps(document)
    for part in ("alice@example.com", "https://p.example/alice", "unsubscribed", "Inside", "b2"):
        assert part in text, part
    assert "bob" not in text
    assert sender.get("/api/users/nobody/export").status_code == 200


def test_erasing_removes_every_trace_of_the_user_and_nobody_elses(
    sender: httpx.Client, service: Running, client: Any, sql: Sql, contents: Callable[[], Json]
) -> None:
    fill("bob", sender, service, client, sql)
    before = contents()
    fill("alice", sender, service, client, sql)
    assert sender.delete("/api/users/alice").status_code == 204
    after = contents()
    assert "alice" not in json.dumps(after)
    assert after == before
    assert sender.delete("/api/users/alice").status_code == 204, "once more is no fault"
    alice = client(service.url, user_token("alice"))
    assert alice.get("/api/unread-count").json() == {"unread_count": 0}


def test_erasing_finds_what_is_made_while_it_waits(
    sender: httpx.Client, reach: Callable[..., None], database: str, sql: Sql
) -> None:
    """As a digest is that other ones are folded into."""
    reach("alice", email="alice@example.org", email_enabled=True)
    assert sender.post("/api/notifications", json=NOTE | {"severity": "warning"}).status_code == 201
    with ThreadPoolExecutor(1) as worker, psycopg.connect(database) as folding:
        folding.execute("SELECT FROM outbox FOR UPDATE")
        erased = worker.submit(sender.delete, "/api/users/alice")
        eventually(lambda: sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        folding.execute("INSERT INTO outbox (user_id, id, channel, target, available_at, provider)"
                        " SELECT user_id, gen_random_uuid(), channel, target, now(), provider FROM outbox")  # fmt: skip
        folding.commit()
        assert erased.result().status_code == 204
    assert sql("SELECT count(*) FROM outbox") == [(0,)]


def test_what_is_about_all_that_a_user_has_may_take_longer_than_a_request_else(
    sender: httpx.Client, sql: Sql
) -> None:
    """Else the caller is told 503 of what goes on and succeeds."""
    sql("CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_sleep(3); RETURN OLD; END'")  # fmt: skip
    sql("CREATE TRIGGER slow BEFORE DELETE ON notifications FOR EACH ROW EXECUTE FUNCTION take_time()")
    try:
        assert sender.post("/api/notifications", json=NOTE).status_code == 201
        assert sender.delete("/api/users/alice").status_code == 204
    finally:
        sql("DROP FUNCTION take_time CASCADE")
    assert sql("SELECT count(*) FROM notifications") == [(0,)]


# ─── Tokens ───


def test_a_token_holds_as_long_as_asked_for_at_most_a_day(sender: httpx.Client) -> None:
    for minutes in (1, 60, 1440):
        reply = sender.post("/api/users/alice/token", json={"minutes": minutes})
        assert reply.status_code == 201 and reply.json().keys() == {"token", "expires_at"}
        claims = jwt.decode(reply.json()["token"], SECRET, ["HS256"])
        ends = datetime.fromisoformat(reply.json()["expires_at"])
        assert claims["sub"] == "alice" and abs(claims["exp"] - ends.timestamp()) < 2
        assert abs((ends - datetime.now(UTC)).total_seconds() - minutes * 60) < 10
    for minutes in (0, -1, 1441, "60", 1.5, None, True):
        problem(sender.post("/api/users/alice/token", json={"minutes": minutes}), 400, "minutes")


# ─── A subject is settled ───


def test_resolving_a_subject_reads_and_archives_it_for_everyone(
    sender: httpx.Client, post: Post, service: Running, client: Any, sql: Sql
) -> None:
    for user in ("alice", "bob"):
        sender.put(f"/api/users/{user}", json={"email": f"{user}@example.com"})
        sender.patch(f"/api/users/{user}/preferences", json={"email_enabled": True, "min_severity": "info"})
        post(user, subject_key="invoice:42", batch_key="b")
        post(user, subject_key="invoice:43", batch_key="b")
        post(user)
    reply = sender.post("/api/resolve", json={"subject_key": "invoice:42"})
    assert reply.status_code == 200 and reply.json() == {"resolved": 2}
    for user in ("alice", "bob"):
        own = client(service.url, user_token(user))
        listing = own.get("/api/notifications").json()
        assert [note["subject_key"] for note in listing["notifications"]] == [None, "invoice:43"]
        assert listing["unread_count"] == 2
        (settled,) = own.get("/api/notifications?archived=1").json()["notifications"]
        assert settled["subject_key"] == "invoice:42" and settled["read_at"] and settled["archived_at"]
        told = own.get(f"/api/notifications/{settled['id']}").json()["deliveries"]
        assert [(one["status"], one["reason"]) for one in told] == [("suppressed", "already_read")]
        assert [
            one["items"] for one in own.get("/api/outbox").json()["outbox"] if one["batch_key"] == "b"
        ] == [1]
    assert sender.post("/api/resolve", json={"subjectKey": "invoice:42"}).json() == {"resolved": 0}
    assert sender.post("/api/resolve", json={"subject_key": "invoice:%"}).json() == {"resolved": 0}
    problem(sender.post("/api/resolve", json={}), 400, "subject_key")
    problem(sender.post("/api/resolve", json={"subject_key": ""}), 400, "subject_key")


def test_resolving_beside_creates_that_join_the_same_digests_never_deadlocks(
    sender: httpx.Client, reach: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadlock is repeated and costs its requests a second each: it shows in the statements alone."""
    users, deadlocks, fetch = [f"user-{n}" for n in range(20)], list[Any](), app.Db.fetch

    async def watched(db: app.Db, *given: Any) -> Any:
        try:
            return await fetch(db, *given)
        except psycopg.errors.DeadlockDetected as error:
            deadlocks.append(error)
            raise

    def create(keys: str, **more: str) -> None:
        asked = NOTE | {"severity": "warning"} | more
        items = [asked | {"user_id": user, "batch_key": key} for user in users for key in keys]
        assert sender.post("/api/notifications/batch", json={"notifications": items}).status_code == 201

    def work(subject: str) -> None:
        for _ in range(12):
            create("awxyz", subject_key=subject)
            assert sender.post("/api/resolve", json={"subject_key": subject}).status_code == 200

    monkeypatch.setattr(app.Db, "fetch", watched)
    for user in users:
        reach(user, email=f"{user}@example.org", email_enabled=True, digest_minutes=60)
    for key in "zyxwa":  # the messages' ids grow while their keys fall
        create(key)
    with ThreadPoolExecutor(3) as workers:
        list(workers.map(work, ["one", "two", "three"]))
    assert deadlocks == []


BROADCAST = """
    WITH told AS (
        INSERT INTO notifications (user_id, id, event_name, title, body, severity, subject_key)
        SELECT %(subject)s || n, gen_random_uuid(), 'e', 't', 'b', 'warning', %(subject)s
        FROM generate_series(1, %(size)s) AS n
        RETURNING user_id, id
    ),
    waiting AS (
        INSERT INTO outbox (user_id, id, channel, target, available_at, provider)
        SELECT user_id, id, 'email', id, now() + interval '1 hour', 'email' FROM told
    )
    INSERT INTO deliveries (user_id, notification_id, channel, target, id, message_id, status)
    SELECT user_id, id, 'email', id, id, id, 'queued' FROM told"""


def test_a_subject_of_twenty_times_as_many_does_not_take_a_hundred_times_as_long(
    api: httpx.Client, postgresql: psycopg.Connection, sql: Sql
) -> None:
    seconds = []
    for subject, size in (("few", 400), ("many", 8000)):
        with postgresql.transaction():
            postgresql.execute(BROADCAST, {"subject": subject, "size": size})
        started = time.perf_counter()
        assert api.post("/api/resolve", json={"subject_key": subject}).json() == {"resolved": size}
        seconds.append(time.perf_counter() - started)
    few, many = seconds
    assert many < 100 * few, "twenty times the work; as a loop over all pairs 400 times"
    assert sql("SELECT count(*), count(reason) FROM deliveries WHERE status = 'suppressed'") == [(8400, 8400)]
    assert sql("SELECT DISTINCT state FROM outbox") == [("void",)]


def test_resolving_reads_what_was_archived_unread(
    sender: httpx.Client, alice: httpx.Client, post: Post
) -> None:
    sent = post(subject_key="s")
    path = f"/api/notifications/{sent['id']}"
    archived = alice.patch(path, json={"archived": True}).json()["notification"]
    assert sender.post("/api/resolve", json={"subject_key": "s"}).json() == {"resolved": 1}
    after = alice.get(path).json()["notification"]
    assert after["read_at"] and after["archived_at"] == archived["archived_at"]
    assert sender.post("/api/resolve", json={"subject_key": "s"}).json() == {"resolved": 0}


def test_resolving_keeps_the_moment_at_which_one_was_read(
    sender: httpx.Client, alice: httpx.Client, post: Post
) -> None:
    sent = post(subject_key="s")
    read = alice.patch("/api/notifications", json={"notification_id": sent["id"]}).json()["notification"]
    assert sender.post("/api/resolve", json={"subject_key": "s"}).json() == {"resolved": 1}
    after = alice.get(f"/api/notifications/{sent['id']}").json()["notification"]
    assert after["read_at"] == read["read_at"] and after["archived_at"]
