"""Digests: what belongs together leaves as one message, once, and never without a part of it."""

import threading
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest
from conftest import Running, app, eventually
from peers import Mailbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
AGE = "UPDATE outbox SET available_at = now() WHERE state = 'open' AND digest LIKE 'key:%'"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def comments(post: Post, count: int, **fields: Any) -> list[str]:
    usual = {"severity": "warning", "batch_key": "ticket:7"}
    return [post(title=f"Comment {number}", **usual | fields)["id"] for number in range(count)]


def test_ten_comments_with_one_key_are_one_mail_with_ten_links(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], service: Running
) -> None:
    ids = comments(post, 10)
    drain()
    assert not mailbox.messages
    sql(AGE)
    drain()
    [letter] = mailbox.messages
    assert letter.subject == "10 notifications"
    for part in (letter.text, letter.html):
        assert [part.count(f"{service.url}/n/{id}") for id in ids] == [1] * 10
    assert sql("SELECT status, count(*) FROM deliveries GROUP BY 1") == [("sent", 10)]


def test_what_was_read_before_it_leaves_is_not_sent(
    post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    comments(post, 10)
    assert alice.patch("/api/notifications", json={"all": True}).json()["updated"] == 10
    sql(AGE)
    drain()
    assert sql("SELECT status, reason, count(*) FROM deliveries GROUP BY 1, 2") == [
        ("suppressed", "already_read", 10)
    ]
    assert sql("SELECT state FROM outbox") == [("void",)]
    assert not mailbox.messages


def test_a_digest_of_which_one_is_left_looks_like_a_single_mail(
    post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    first, second = comments(post, 2)
    alice.patch("/api/notifications", json={"notification_id": first})
    sql(AGE)
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["Comment 1"]
    assert second in mailbox.messages[0].text and first not in mailbox.messages[0].text


def test_a_window_lasts_digest_minutes_from_its_first_item_and_is_never_extended(
    post: Post, reach: Callable[..., None], sql: Sql
) -> None:
    reach("alice", digest_minutes=7)
    comments(post, 1)
    [(due, wait)] = sql("SELECT available_at, extract(epoch FROM available_at - created_at) FROM outbox")
    assert wait == 7 * 60
    comments(post, 3)
    assert sql("SELECT available_at FROM outbox") == [(due,)]


def test_without_a_waiting_time_each_leaves_at_once(
    post: Post, reach: Callable[..., None], mailbox: Mailbox, drain: Callable[[], None]
) -> None:
    reach("alice", digest_minutes=0)
    comments(post, 2)
    drain()
    assert sorted(letter.subject for letter in mailbox.messages) == ["Comment 0", "Comment 1"]


def test_different_keys_never_mix(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], reach: Callable[..., None]
) -> None:
    reach("bob", email="bob@example.org", email_enabled=True)
    expected = {}
    for user, key in [("alice", "a"), ("alice", "b"), ("alice", "a "), ("bob", "a")]:
        expected[user, key] = set(comments(post, 3, user_id=user, batch_key=key))
    sql(AGE)
    drain()
    assert len(mailbox.messages) == 4
    for (user, _), ids in expected.items():
        holding = [letter for letter in mailbox.messages if any(id in letter.text for id in ids)]
        assert len(holding) == 1 and all(id in holding[0].text for id in ids)
        assert holding[0].recipients == [f"{user}@example.org"]
        assert holding[0].subject == "3 notifications"


def test_a_critical_one_leaves_at_once_and_alone_whatever_its_key(
    post: Post, mailbox: Mailbox, drain: Callable[[], None], sql: Sql
) -> None:
    comments(post, 2)
    post(title="Fire", severity="critical", batch_key="ticket:7")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["Fire"]
    assert sql("SELECT count(*) FROM deliveries WHERE status = 'queued'") == [(2,)]


def test_an_event_during_the_flush_opens_the_next_window(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    mailbox.script("DATA", "451 4.3.0 later")
    comments(post, 2)
    sql(AGE)
    eventually(lambda: sql("SELECT 1 FROM outbox WHERE state = 'pending'"))
    late = comments(post, 1)
    assert sql("SELECT state, count(*) FROM outbox GROUP BY 1 ORDER BY 1") == [("open", 1), ("pending", 1)]
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert sorted(letter.subject for letter in mailbox.messages) == ["2 notifications", "Comment 0"]
    assert [late[0] in letter.text for letter in mailbox.messages].count(True) == 1


def test_most_severe_first_then_newest_ten_shown_the_rest_counted(
    post: Post, reach: Callable[..., None], mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", min_severity="info")
    severities = ["info"] * 5 + ["warning", "success", "warning"] + ["info"] * 5
    posted = [
        post(title=f"{severity} {number:02}", severity=severity, batch_key="k")
        for number, severity in enumerate(severities)
    ]
    sql(AGE)
    drain()
    [letter] = mailbox.messages
    assert letter.subject == "13 notifications"
    expected = ["warning 07", "warning 05", "success 06"] + [f"info {n:02}" for n in (12, 11, 10, 9, 8, 4, 3)]
    titles = [one["title"] for one in posted if one["title"] in letter.text]
    assert sorted(titles, key=letter.text.index) == expected
    assert "and 3 more" in letter.text


def test_two_first_events_at_the_same_instant_always_share_one_message(database: str, sql: Sql) -> None:
    """Two connections, 500 times at once; each pair opens a window that did not exist a moment before."""
    sql("INSERT INTO notification_preferences (user_id, email, email_enabled) VALUES ('alice', 'a@b.c', true)"
        " ON CONFLICT DO NOTHING")  # fmt: skip
    meeting, query = threading.Barrier(2), app.QUERIES["create_notifications"].text
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            with psycopg.connect(database, autocommit=True) as connection:
                for turn in range(500):
                    asked = app.NotificationCreate(
                        event_name="e",
                        title=f"{writer}",
                        body="",
                        severity="warning",
                        batch_key=f"window {turn}",
                    )
                    items = app.encode([app.make_item("alice", asked)])
                    meeting.wait(10)
                    connection.execute(query, {"items": items, "limits": "{}", "no_target": app.NO_TARGET})
        except BaseException as error:
            meeting.abort()
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counts = sql("SELECT count(*), count(DISTINCT d.message_id) FROM deliveries d JOIN outbox o ON o.id = d.message_id"
                 " GROUP BY o.digest")  # fmt: skip
    assert counts == [(2, 1)] * 500


def nap(name: str) -> bytes:
    """The statement, slowed down between what it sees and what it locks."""
    text = app.QUERIES[name].text.decode()
    slow = {
        "claim_messages": (
            "WHERE p.paused_until IS NULL OR",
            "WHERE pg_sleep(0.3) IS NOT NULL AND p.paused_until IS NULL OR",
        ),
        "update_due_messages": (
            "WHERE o.provider = a.name",
            "WHERE pg_sleep(0.3) IS NOT NULL AND o.provider = a.name",
        ),
    }[name]
    assert text.count(slow[0]) == 1
    return text.replace(*slow).encode()


@pytest.mark.parametrize("name", ["claim_messages", "update_due_messages"])
def test_what_joins_between_a_look_and_its_lock_is_not_lost(
    service: Running,
    post: Post,
    mailbox: Mailbox,
    database: str,
    sql: Sql,
    name: str,
    drain: Callable[[], None],
) -> None:
    """An event that joins a digest just then is not yet seen: the digest has to wait for the next look."""
    with service.paused():
        first = comments(post, 1)
        sql(AGE)
        # In one case the digest may leave, in the other it is over the limit and would be folded.
        sql("UPDATE outbox SET token_minute = now() WHERE %s", name == "claim_messages")
        sql(
            "INSERT INTO rate_limits VALUES ('alice', 'email', %s, date_trunc('minute', now()), 9)",
            app.NO_TARGET,
        )
        bound = service.service.db.bound | {"room": 9, "share": 9, "busy": "{}", "mail": True}
        bound["limits"] = '{"email": 1}'
        slow = threading.Thread(target=run, args=(database, nap(name), bound))
        slow.start()
        eventually(lambda: sql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))
        late = comments(post, 1)
        slow.join()
        assert sql("SELECT count(DISTINCT message_id), count(*) FROM deliveries") == [(1, 2)]
        assert sql("SELECT state, digest FROM outbox") == [("open", "key:ticket:7")]
    drain()
    [letter] = mailbox.messages
    assert all(id in letter.text for id in first + late)
    assert sql("SELECT status, count(*) FROM deliveries GROUP BY 1") == [("sent", 2)]


def run(database: str, query: bytes, parameters: dict[str, Any]) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(query, parameters)
