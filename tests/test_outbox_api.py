"""A user's outbox: what is about to leave, and the two buttons beside it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from conftest import Running, app, eventually, problem
from peers import HANG, Hookbox, Mailbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(channel_timeout_seconds=2)


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def outbox(user: httpx.Client) -> list[dict[str, Any]]:
    return user.get("/api/outbox").json()["outbox"]


def test_it_lists_what_is_still_to_leave_the_next_first(
    post: Post, alice: httpx.Client, bob: httpx.Client, reach: Any, drain: Callable[[], None]
) -> None:
    post(severity="warning")
    for key, minutes in (("later", 9), ("sooner", 3)):
        reach("alice", digest_minutes=minutes)
        for _ in range(minutes):
            post(severity="warning", batch_key=key)
    drain()
    first, second = outbox(alice)
    assert first.keys() == {"id", "channel", "batch_key", "items", "available_at", "status"}
    shown = [(one["channel"], one["batch_key"], one["items"], one["status"]) for one in (first, second)]
    assert shown == [("email", "sooner", 3, "open"), ("email", "later", 9, "open")]
    due = datetime.fromisoformat(first["available_at"])
    assert timedelta(minutes=2) < due - datetime.now(UTC) <= timedelta(minutes=3)
    assert outbox(bob) == []


def test_send_lets_it_leave_now_and_a_second_time_is_404(
    post: Post, alice: httpx.Client, mailbox: Mailbox, drain: Callable[[], None]
) -> None:
    ids = [post(severity="warning", batch_key="k")["id"] for _ in range(2)]
    [waiting] = outbox(alice)
    assert alice.post(f"/api/outbox/{waiting['id']}/send").status_code == 200
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["2 notifications"]
    assert all(id in mailbox.messages[0].text for id in ids)
    assert outbox(alice) == []
    problem(alice.post(f"/api/outbox/{waiting['id']}/send"), 404)


def test_send_needs_neither_room_in_the_minute_nor_the_morning(
    delivering: Any,
    post: Post,
    alice: httpx.Client,
    reach: Any,
    mailbox: Mailbox,
    sql: Sql,
    drain: Any,
    service: Running,
) -> None:
    now = datetime.now(UTC)
    reach(
        "alice", quiet_from=f"{now - timedelta(hours=1):%H:%M}", quiet_to=f"{now + timedelta(hours=1):%H:%M}"
    )
    post(severity="warning")
    drain()
    [waiting] = outbox(alice)
    assert not mailbox.messages
    assert alice.post(f"/api/outbox/{waiting['id']}/send").status_code == 200
    drain()
    assert len(mailbox.messages) == 1


def test_send_also_shortens_the_wait_for_a_retry(
    post: Post, alice: httpx.Client, mailbox: Mailbox, drain: Callable[[], None]
) -> None:
    mailbox.script("DATA", "451 4.3.0 later")
    post(severity="warning")
    drain()
    [waiting] = outbox(alice)
    assert waiting["status"] == "pending"
    assert alice.post(f"/api/outbox/{waiting['id']}/send").status_code == 200
    drain()
    assert len(mailbox.messages) == 1


def test_skip_lets_it_never_leave(
    post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    id, *_ = [post(severity="warning", batch_key="k")["id"] for _ in range(3)]
    [waiting] = outbox(alice)
    assert alice.post(f"/api/outbox/{waiting['id']}/skip").status_code == 200
    assert outbox(alice) == []
    [delivery] = alice.get(f"/api/notifications/{id}").json()["deliveries"]
    assert delivery["status"] == "cancelled"
    problem(alice.post(f"/api/outbox/{waiting['id']}/skip"), 404)
    problem(alice.post(f"/api/outbox/{waiting['id']}/send"), 404)
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert not mailbox.messages
    assert sql("SELECT status, count(*) FROM deliveries GROUP BY 1") == [("cancelled", 3)]
    assert sql("SELECT state FROM outbox") == [("void",)]
    assert alice.get("/api/unread-count").json()["unread_count"] == 3, "skipped, not read"


def test_what_comes_after_a_skip_is_sent(
    post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    post(severity="warning", batch_key="k", title="skipped")
    alice.post(f"/api/outbox/{outbox(alice)[0]['id']}/skip")
    post(severity="warning", batch_key="k", title="later")
    assert [one["items"] for one in outbox(alice)] == [1]
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["later"]


def test_a_batch_that_begins_after_a_skip_has_its_own_time(
    service: Running, post: Post, alice: httpx.Client, sql: Sql, drain: Callable[[], None], mailbox: Mailbox
) -> None:
    post(severity="warning", batch_key="k", title="skipped")
    [skipped] = outbox(alice)
    sql("UPDATE outbox SET available_at = now() + interval '1 second'")
    assert alice.post(f"/api/outbox/{skipped['id']}/skip").status_code == 200
    post(severity="warning", batch_key="k", title="later")
    [begun] = outbox(alice)
    assert begun["id"] != skipped["id"] and begun["batch_key"] == "k"
    assert sql(
        "SELECT available_at > now() + interval '4 minutes' FROM outbox WHERE id = %s", begun["id"]
    ) == [(True,)]
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["later"]
    assert sql("SELECT state FROM outbox WHERE id = %s", skipped["id"]) == [("void",)]


def test_what_is_under_way_can_neither_be_skipped_nor_sent_again(
    post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    mailbox.script("DATA", HANG)
    post(severity="warning")
    eventually(lambda: sql("SELECT 1 FROM outbox WHERE state = 'sending'"))
    [waiting] = outbox(alice)
    assert waiting["status"] == "sending"
    for button in ("skip", "send"):
        problem(alice.post(f"/api/outbox/{waiting['id']}/{button}"), 404)
    drain()


def test_each_target_is_a_message_of_its_own(
    service: Running,
    post: Post,
    api: httpx.Client,
    alice: httpx.Client,
    hookbox: Hookbox,
    drain: Callable[[], None],
) -> None:
    api.post("/api/webhooks", json={"url": hookbox.url})
    with service.paused():
        post(severity="warning")
        by_channel = {one["channel"]: one["id"] for one in outbox(alice)}
        assert by_channel.keys() == {"email", "webhook"}
        alice.post(f"/api/outbox/{by_channel['webhook']}/skip")
        assert [one["channel"] for one in outbox(alice)] == ["email"]
    drain()
    assert not hookbox.requests


@pytest.mark.parametrize("batch_key", [None, "k"])
@pytest.mark.parametrize("way", ["skip", "resolve"])
def test_a_claim_that_began_before_notices_what_was_taken_back(
    service: Running, database: str, post: Post, api: httpx.Client, alice: httpx.Client, sql: Sql,
    batch_key: str | None, way: str,
) -> None:  # fmt: skip
    """Its snapshot still shows the items as waiting: what tells it otherwise is the message itself."""
    with service.paused(), psycopg.connect(database) as late:
        post(severity="warning", batch_key=batch_key, subject_key="s")
        sql("UPDATE outbox SET available_at = now(), token_minute = now()")
        late.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        late.execute("SELECT")
        answer = (
            alice.post(f"/api/outbox/{outbox(alice)[0]['id']}/skip")
            if way == "skip"
            else api.post("/api/resolve", json={"subject_key": "s"})
        )
        assert answer.status_code == 200 and outbox(alice) == []
        with pytest.raises(psycopg.errors.SerializationFailure):
            late.execute(
                app.QUERIES["claim_messages"].text,
                service.service.worker.db.bound | {"room": 9, "busy": "{}"},
            )
    sql("UPDATE outbox SET available_at = now()")
    eventually(lambda: sql("SELECT state FROM outbox") == [("void",)])


def test_resolving_takes_items_out_of_what_waits(
    post: Post, api: httpx.Client, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    for number in range(4):
        post(severity="warning", batch_key="k", subject_key="s" if number % 2 else None)
    assert api.post("/api/resolve", json={"subject_key": "s"}).json() == {"resolved": 2}
    assert [one["items"] for one in outbox(alice)] == [2]
    assert sql("SELECT count(*) FROM deliveries WHERE reason = 'already_read'") == [(2,)]
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["2 notifications"]
    assert api.post("/api/resolve", json={"subject_key": "s"}).json() == {"resolved": 0}
