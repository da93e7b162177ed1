"""Rate limits: the inbox takes everything, the outside a few a minute; what is too much is folded, never dropped."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest
from conftest import Running, app
from peers import Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
NEXT_MINUTE = [
    "UPDATE rate_limits SET minute = minute - interval '1 minute'",
    "UPDATE outbox SET available_at = available_at - interval '1 minute', token_minute = token_minute - interval '1 minute'"
    " WHERE state = 'open'",
]


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(email_per_minute=5, push_per_minute=3, webhook_per_minute=4)


@pytest.fixture(autouse=True)
def within_one_minute(service: Running) -> None:
    """No real minute turns in the middle of a test, which begins when the service is there."""
    while time.time() % 60 > 54:
        time.sleep(0.1)


@pytest.fixture
def turn_the_minute(sql: Sql, drain: Callable[[], None]) -> Callable[[], None]:
    """What was said of the next minute is now said of this one."""

    def turn() -> None:
        for statement in NEXT_MINUTE:
            sql(statement)
        drain()

    return turn


@pytest.fixture
def burst(api: httpx.Client) -> Callable[..., list[str]]:
    """Many notifications in one moment; gives their ids."""

    def send(count: int, severity: str = "warning", user_id: str = "alice", **fields: Any) -> list[str]:
        usual = {"user_id": user_id, "event_name": "disk.full", "body": "", "severity": severity} | fields
        items = [usual | {"title": f"{severity} {number:03}"} for number in range(count)]
        reply = api.post("/api/notifications/batch", json={"notifications": items})
        assert reply.status_code == 201, reply.text
        return [result["id"] for result in reply.json()["results"]]

    return send


@pytest.fixture
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def mailed(sql: Sql) -> Counter[str]:
    """How often each notification was in a message that was sent."""
    rows = sql("SELECT d.notification_id FROM deliveries d JOIN outbox o ON o.id = d.message_id"
               " WHERE d.status = 'sent' AND o.state = 'sent'")  # fmt: skip
    return Counter(str(id) for (id,) in rows)


def test_of_100_warnings_in_a_minute_5_leave_alone_and_95_in_one_digest(
    mail_to_alice: None, burst: Any, post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql,
    drain: Callable[[], None], turn_the_minute: Callable[[], None],
) -> None:  # fmt: skip
    ids = burst(100)
    assert alice.get("/api/unread-count").json() == {"unread_count": 100}
    drain()
    assert sorted(letter.subject for letter in mailbox.messages) == [f"warning {n:03}" for n in range(5)]
    fire = post(title="Fire", severity="critical")
    drain()
    assert mailbox.messages[5].subject == "Fire" and fire["id"] in mailbox.messages[5].text
    [(digest,)] = sql("SELECT extract(second FROM available_at) FROM outbox WHERE state = 'open'")
    assert digest == 0, "it leaves when the next minute begins"
    turn_the_minute()
    assert [letter.subject for letter in mailbox.messages[6:]] == ["95 notifications"]
    assert "and 85 more" in mailbox.messages[6].text
    assert mailed(sql) == Counter([*ids, fire["id"]])


def test_posts_by_many_at_once_get_no_more_than_the_limit(
    mail_to_alice: None,
    database: str,
    sql: Sql,
    drain: Callable[[], None],
    mailbox: Mailbox,
    service: Running,
) -> None:
    limits, meeting = '{"email": 5}', threading.Barrier(4)

    def write() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            meeting.wait(10)
            for number in range(10):
                asked = app.NotificationCreate(event_name="e", title=str(number), body="", severity="warning")
                parameters = {"items": app.encode([app.make_item("alice", asked)]), "limits": limits}
                connection.execute(
                    app.QUERIES["create_notifications"].text, parameters | {"no_target": app.NO_TARGET}
                )

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = sql("SELECT count(*) FROM outbox WHERE digest IS NULL GROUP BY token_minute ORDER BY 1")
    assert max(alone) == (5,)
    assert sql("SELECT count(*) FROM deliveries WHERE message_id IS NULL") == [(0,)]
    assert sql("SELECT count(*) FROM deliveries") == [(40,)]


def test_an_overflow_digest_costs_a_message_of_the_minute_it_leaves_in(
    mail_to_alice: None,
    burst: Any,
    mailbox: Mailbox,
    turn_the_minute: Any,
    sql: Sql,
    drain: Callable[[], None],
) -> None:
    first = burst(8)
    drain()
    turn_the_minute()
    assert [letter.subject for letter in mailbox.messages[5:]] == ["3 notifications"]
    second = burst(8)
    drain()
    assert len(mailbox.messages[6:]) == 4, "the digest was the first of five"
    turn_the_minute()
    assert [letter.subject for letter in mailbox.messages[10:]] == ["4 notifications"]
    assert mailed(sql) == Counter(first + second)


def test_after_an_outage_of_many_minutes_a_limit_of_messages_leaves_and_the_rest_in_a_digest(
    service: Running, mail_to_alice: None, burst: Any, mailbox: Mailbox, sql: Sql, drain: Callable[[], None],
    turn_the_minute: Callable[[], None],
) -> None:  # fmt: skip
    """A message that did not leave in the minute of its token asks again: else all would leave at once."""
    with service.paused():
        ids = list[str]()
        for _ in range(4):
            ids += burst(7) + burst(1, batch_key=f"key {len(ids)}")
            for statement in NEXT_MINUTE:
                sql(statement)
            sql("UPDATE outbox SET available_at = now() WHERE digest LIKE 'key:%'")
    drain()
    subjects = [letter.subject for letter in mailbox.messages]
    assert len(subjects) <= 5 and [words for words in subjects if words[0].isdigit()] == ["29 notifications"]
    ids += burst(1)
    drain()
    assert len(mailbox.messages) == len(subjects), "nothing is left of this minute"
    turn_the_minute()
    assert mailed(sql) == Counter(ids)


def test_what_waits_for_one_browsers_service_takes_no_room_from_another_browser(
    reach: Callable[..., None], burst: Any, alice: httpx.Client, pushbox: Pushbox, sql: Sql, drain: Callable[[], None]
) -> None:  # fmt: skip
    reach("alice", push_enabled=True)
    for address in (pushbox.url, "http://127.0.0.1:9"):
        browser = pushbox.subscription().to_json()
        browser["endpoint"] = browser["endpoint"].replace(pushbox.url, address)
        assert alice.post("/api/push/subscriptions", json=browser).status_code == 201
    sql("INSERT INTO breakers VALUES ('push:127.0.0.1:9', 10, now() + interval '1 hour')")
    for number in range(1, 6):
        burst(1)
        drain()
        assert [shown["title"] for shown in pushbox.messages] == ["warning 000"] * number
        for statement in NEXT_MINUTE:
            sql(statement)
    waiting = sql("SELECT digest, count(*) FROM outbox WHERE state = 'open' GROUP BY 1 ORDER BY 1")
    assert waiting == [(None, 5)], "of a limit of three each minute each browser took one"


def test_a_batch_digest_over_the_limit_leaves_with_the_overflow(
    mail_to_alice: None,
    burst: Any,
    mailbox: Mailbox,
    turn_the_minute: Any,
    sql: Sql,
    drain: Callable[[], None],
) -> None:
    ids = burst(3, batch_key="a") + burst(3, batch_key="b") + burst(5)
    sql("UPDATE outbox SET available_at = now() WHERE digest LIKE 'key:%'")
    drain()
    assert len(mailbox.messages) == 5
    ids += burst(1)
    assert sql("SELECT digest FROM outbox WHERE state = 'open'") == [("overflow",)]
    turn_the_minute()
    assert [letter.subject for letter in mailbox.messages[5:]] == ["7 notifications"]
    assert mailed(sql) == Counter(ids)


def test_a_batch_digest_within_the_limit_costs_one_message(
    mail_to_alice: None, burst: Any, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    burst(9, batch_key="a")
    burst(9, batch_key="b")
    sql("UPDATE outbox SET available_at = now() WHERE digest LIKE 'key:%'")
    drain()
    burst(5)
    drain()
    subjects = sorted(letter.subject for letter in mailbox.messages)
    assert subjects == ["9 notifications"] * 2 + ["warning 000", "warning 001", "warning 002"]


def test_a_due_digest_is_not_claimed_before_its_minute_had_room_for_it(
    service: Running, mail_to_alice: None, burst: Any, sql: Sql
) -> None:
    given = {"room": 9, "share": 9, "busy": "{}", "mail": True}
    with service.paused():
        burst(2, batch_key="a")
        sql("UPDATE outbox SET available_at = now()")
        worker = service.service.worker
        assert service.call(worker.db.many("claim_messages", **given)) == []
        service.call(worker.db.run("update_due_messages"))
        assert len(service.call(worker.db.many("claim_messages", **given))) == 1


def test_critical_ones_are_exempt_up_to_30_a_minute_and_fold_beyond(
    mail_to_alice: None,
    burst: Any,
    mailbox: Mailbox,
    turn_the_minute: Any,
    sql: Sql,
    drain: Callable[[], None],
) -> None:
    ids = burst(5) + burst(33, "critical")
    drain()
    assert len(mailbox.messages) == 35
    turn_the_minute()
    assert [letter.subject for letter in mailbox.messages[35:]] == ["3 notifications"]
    assert mailed(sql) == Counter(ids)


def test_a_limit_is_a_users_own(
    mail_to_alice: None, reach: Callable[..., None], burst: Any, mailbox: Mailbox, drain: Callable[[], None]
) -> None:
    reach("bob", email="bob@example.org", email_enabled=True)
    burst(9)
    burst(2, user_id="bob")
    drain()
    to = Counter(letter.recipients[0] for letter in mailbox.messages)
    assert to == {"alice@example.org": 5, "bob@example.org": 2}


def test_pushes_over_the_limit_fold_into_one_that_replaces_the_last(
    reach: Callable[..., None], burst: Any, alice: httpx.Client, pushbox: Pushbox, turn_the_minute: Any,
    drain: Callable[[], None], service: Running, sql: Sql,
) -> None:  # fmt: skip
    reach("alice", push_enabled=True)
    assert alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json()).status_code == 201
    ids = burst(6)
    drain()
    assert sorted(shown["title"] for shown in pushbox.messages) == [f"warning {n:03}" for n in range(3)]
    turn_the_minute()
    digest = pushbox.messages[3]
    assert (digest["title"], digest["id"], digest["url"]) == ("3 notifications", ids[5], f"{service.url}/")
    ids += burst(6)
    drain()
    turn_the_minute()
    assert pushbox.messages[-1]["title"] == "4 notifications", "one of three was the digest before"
    assert pushbox.messages[-1]["tag"] == digest["tag"]
    topics = [hit.headers["Topic"] for hit in pushbox.taken]
    assert topics[-1] == topics[3] and len(set(topics)) == len(topics) - 1
    assert mailed(sql) == Counter(ids)


def test_each_browser_has_its_digest_and_each_digest_its_token(
    reach: Callable[..., None], burst: Any, alice: httpx.Client, pushbox: Pushbox, turn_the_minute: Any,
    drain: Callable[[], None], sql: Sql,
) -> None:  # fmt: skip
    reach("alice", push_enabled=True)
    for _ in range(2):
        assert alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json()).is_success
    ids = list[str]()
    for leave_now in (3, 1, 1):
        before = len(pushbox.messages)
        ids += burst(4)
        drain()
        assert len(pushbox.messages) == before + leave_now
        turn_the_minute()
        digests = sorted(shown["title"] for shown in pushbox.messages[before + leave_now :])
        alone = leave_now // 2  # notifications that both browsers showed at once
        assert digests == [f"{3 - alone} notifications", f"{4 - alone} notifications"]
    assert mailed(sql) == Counter(ids * 2)


def test_webhooks_over_the_limit_wait_one_by_one_for_a_minute_with_room(
    api: httpx.Client, burst: Any, hookbox: Hookbox, sql: Sql, turn_the_minute: Any, drain: Callable[[], None]
) -> None:
    assert api.post("/api/webhooks", json={"url": hookbox.url}).status_code == 201
    burst(6, user_id="alice")
    burst(6, user_id="bob")
    drain()
    assert len(hookbox.requests) == 4, "the limit is the endpoint's"
    minutes = sql("SELECT (extract(epoch FROM available_at - date_trunc('minute', now())) / 60)::int, count(*)"
                  " FROM outbox WHERE state = 'open' GROUP BY 1 ORDER BY 1")  # fmt: skip
    assert minutes in ([(1, 4), (2, 4)], [(0, 4), (1, 4)]), "the second where the minute has turned"
    for count in (8, 12):
        turn_the_minute()
        assert len(hookbox.requests) == count
    assert len({hit.json["data"]["id"] for hit in hookbox.requests}) == 12


def test_webhooks_that_did_not_leave_in_their_minute_get_in_line_again(
    service: Running, api: httpx.Client, burst: Any, hookbox: Hookbox, sql: Sql, turn_the_minute: Any,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    """After an outage all are due; still no more than the limit of them leave in one minute."""
    assert api.post("/api/webhooks", json={"url": hookbox.url}).status_code == 201
    with service.paused():
        for _ in range(3):
            burst(4)
            for statement in NEXT_MINUTE:
                sql(statement)
    burst(2)
    drain()
    for count in (4, 8, 12, 14):
        assert len(hookbox.requests) == count
        turn_the_minute()
    assert len({hit.json["data"]["id"] for hit in hookbox.requests}) == 14


def test_a_retry_costs_a_message_of_the_minute_it_leaves_in_and_keeps_its_identity(
    mail_to_alice: None, burst: Any, mailbox: Mailbox, sql: Sql, turn_the_minute: Any, drain: Callable[[], None]
) -> None:  # fmt: skip
    mailbox.script("RCPT", *["451 4.3.0 later"] * 4)
    ids = burst(4)
    drain()
    tried = {str(id) for (id,) in sql("SELECT id FROM outbox WHERE state = 'pending'")}
    assert len(tried) == 4 and not mailbox.messages
    for statement in NEXT_MINUTE:
        sql(statement)
    sql("UPDATE outbox SET token_minute = token_minute - interval '1 minute' WHERE state = 'pending'")
    ids += burst(3)
    drain()
    assert len(mailbox.messages) == 3
    sql("UPDATE outbox SET available_at = now() WHERE state = 'pending'")
    drain()
    waiting = sql("SELECT count(*), min(attempts), max(attempts), bool_and(available_at > now()) FROM outbox"
                  " WHERE state = 'pending'")  # fmt: skip
    assert (len(mailbox.messages), waiting) == (5, [(2, 1, 1, True)]), "two of five were left for four"
    sql("UPDATE outbox SET available_at = available_at - interval '1 minute' WHERE state = 'pending'")
    turn_the_minute()
    assert mailed(sql) == Counter(ids)
    names = [str(letter.message["Message-ID"]).strip("<>").partition("@")[0] for letter in mailbox.messages]
    assert tried <= set(names)


def test_a_retry_finds_room_beside_the_overflow_of_a_limit_of_one(
    delivering: Callable[..., Running], service: Running, mail_to_alice: None, sql: Sql
) -> None:
    """Else a user who is told too much every minute would never get what was tried once."""
    strict = delivering(email_per_minute=1, delivery_concurrency=0)
    asked = app.NotificationCreate(event_name="e", title="t", body="", severity="warning")
    with service.paused():
        strict.call(strict.service.intake.ask([app.make_item("alice", asked)]))
        sql("UPDATE outbox SET state = 'pending', attempts = 1")
        strict.call(strict.service.intake.ask([app.make_item("alice", asked) for _ in range(3)]))
        for statement in [*NEXT_MINUTE, "UPDATE outbox SET token_minute = NULL WHERE state = 'pending'"]:
            sql(statement)
        strict.call(strict.service.worker.db.run("update_due_messages"))
        leaving = "SELECT count(*) FROM outbox WHERE token_minute = date_trunc('minute', now()) AND available_at <= now()"
        assert sql(leaving) == [(2,)]


def test_a_retry_waits_a_minute_however_many_fold_beside_it(
    service: Running, mail_to_alice: None, burst: Any, sql: Sql
) -> None:
    with service.paused():
        burst(1)
        sql("UPDATE outbox SET state = 'pending', attempts = 1, token_minute = NULL")
        burst(1000)
        service.call(service.service.worker.db.run("update_due_messages"))
        waits = "SELECT available_at = date_trunc('minute', now()) + interval '1 minute' FROM outbox WHERE state = 'pending'"
        assert sql(waits) == [(True,)]


def test_a_push_that_was_tried_finds_room_beside_the_digest_of_every_browser(
    service: Running, reach: Callable[..., None], burst: Any, alice: httpx.Client, pushbox: Pushbox, sql: Sql
) -> None:  # fmt: skip
    reach("alice", push_enabled=True)
    for _ in range(3):
        assert alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json()).is_success
    with service.paused():
        burst(2)
        sql("UPDATE outbox SET state = 'pending', attempts = 1 WHERE digest IS NULL AND id ="
            " (SELECT id FROM outbox WHERE digest IS NULL ORDER BY id LIMIT 1)")  # fmt: skip
        for statement in [*NEXT_MINUTE, "UPDATE outbox SET token_minute = NULL WHERE state = 'pending'"]:
            sql(statement)
        sql("UPDATE outbox SET state = 'sent' WHERE state = 'open' AND digest IS NULL")
        service.call(service.service.worker.db.run("update_due_messages"))
        assert sql(
            "SELECT token_minute = date_trunc('minute', now()) FROM outbox WHERE state = 'pending'"
        ) == [(True,)]


def test_one_process_at_a_time_gives_tokens(
    service: Running, mail_to_alice: None, burst: Any, database: str, sql: Sql
) -> None:
    """Two would lock the same users' rows and counters in orders of their own."""
    ask = service.service.worker.db.run
    with service.paused(), psycopg.connect(database) as other:
        burst(2)
        sql("UPDATE outbox SET token_minute = NULL")
        other.execute("SELECT pg_advisory_xact_lock(hashtext('bellhop tokens'))")
        assert service.call(ask("update_due_messages")) == 0
        other.rollback()
        assert service.call(ask("update_due_messages")) == 2


def test_a_crash_needs_no_second_token(
    service: Running, mail_to_alice: None, burst: Any, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    with service.paused():
        burst(5)
        sql("UPDATE outbox SET state = 'sending', available_at = now() - interval '1 second',"
            " token_minute = token_minute - interval '1 minute'")  # fmt: skip
        assert service.call(service.service.worker.db.run("update_due_messages")) == 0
    drain()
    assert len(mailbox.messages) == 5


def test_more_than_30_critical_ones_that_waited_fold_as_well(
    service: Running, mail_to_alice: None, burst: Any, mailbox: Mailbox, sql: Sql, turn_the_minute: Any,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    with service.paused():
        ids = burst(20, "critical")
        for statement in NEXT_MINUTE:
            sql(statement)
        ids += burst(20, "critical")
    drain()
    assert len(mailbox.messages) == 30
    turn_the_minute()
    assert [letter.subject for letter in mailbox.messages[30:]] == ["10 notifications"]
    assert mailed(sql) == Counter(ids)


def test_a_critical_webhook_does_not_wait_behind_the_others(
    api: httpx.Client, burst: Any, hookbox: Hookbox, sql: Sql, drain: Callable[[], None], turn_the_minute: Any
) -> None:
    api.post("/api/webhooks", json={"url": hookbox.url})
    burst(6)
    burst(32, "critical")
    drain()
    severities = Counter(hit.json["data"]["severity"] for hit in hookbox.requests)
    assert severities == {"warning": 4, "critical": 30}
    turn_the_minute()
    assert len(hookbox.requests) == 38


def test_a_digest_that_may_leave_takes_along_what_folds_into_it_just_then(
    service: Running, mail_to_alice: None, burst: Any, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    """Critical ones have a limit of their own, but one digest with the others."""
    with service.paused():
        ids = burst(6)
        for statement in NEXT_MINUTE:
            sql(statement)
        ids += burst(5)
        urgent = burst(31, "critical")
        sql("UPDATE outbox SET state = 'sent', finished_at = now() WHERE critical AND digest IS NULL")
        for statement in NEXT_MINUTE * 2:
            sql(statement)
        assert service.call(service.service.worker.db.run("update_due_messages")) == 10, "nine and the digest"
        [digest] = sql("SELECT critical, count(*) FROM outbox o JOIN deliveries d ON d.message_id = o.id"
                       " WHERE digest = 'overflow' GROUP BY critical")  # fmt: skip
        assert sql("SELECT count(*) FROM outbox WHERE state = 'open' AND digest IS NULL") == [(5,)]
        assert digest == (True, 2 + 1 + 4)
    drain()
    assert "7 notifications" in [letter.subject for letter in mailbox.messages]
    assert len(mailed(sql)) == len(ids) + 1 and urgent[-1] in mailed(sql)


def test_a_critical_one_that_folds_makes_its_digest_critical(
    service: Running, mail_to_alice: None, burst: Any, sql: Sql
) -> None:
    with service.paused():
        burst(6)
        burst(20, "critical")
        for statement in NEXT_MINUTE:
            sql(statement)
        burst(20, "critical")
        assert sql("SELECT critical FROM outbox WHERE digest = 'overflow'") == [(False,)]
        service.call(service.service.worker.db.run("update_due_messages"))
        assert sql("SELECT critical FROM outbox WHERE digest = 'overflow'") == [(True,)]


def test_what_its_reader_sends_now_asks_for_no_token(
    service: Running, mail_to_alice: None, burst: Any, alice: httpx.Client, mailbox: Mailbox, sql: Sql,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    with service.paused():
        burst(4, batch_key="k")
        burst(30, "critical")
        [waiting] = [each for each in alice.get("/api/outbox").json()["outbox"] if each["items"] > 1]
        assert alice.post(f"/api/outbox/{waiting['id']}/send").status_code == 200
        sql("UPDATE outbox SET state = 'sent', finished_at = now() WHERE digest IS NULL")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["4 notifications"]


def test_no_limit_is_no_limit(
    delivering: Any, sql: Sql, burst: Any, reach: Any, mailbox: Mailbox, drain: Any
) -> None:
    """A second service without limits writes into the same database; the first one sends."""
    other = delivering(email_per_minute=0, delivery_concurrency=0)
    reach("alice", email="alice@example.org", email_enabled=True)
    asked = app.NotificationCreate(event_name="e", title="t", body="", severity="critical")
    other.call(other.service.intake.ask([app.make_item("alice", asked) for _ in range(40)]))
    drain()
    assert len(mailbox.messages) == 40


def test_the_answer_tells_when_each_message_leaves(
    mail_to_alice: None, api: httpx.Client, burst: Any
) -> None:
    burst(5)
    body = {"user_id": "alice", "event_name": "e", "title": "t", "body": "", "severity": "warning"}
    told = api.post("/api/notifications", json=body).json()
    [delivery] = told["deliveries"]
    assert delivery["status"] == "queued"
    assert re.search(r":00(\.0+)?(Z|\+00:00)$", delivery["available_at"])


def test_an_overflow_digest_that_missed_its_minute_is_not_held_again(
    delivering: Callable[..., Running], service: Running, mail_to_alice: None, sql: Sql, mailbox: Mailbox,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    """A line may be longer than a minute, and there may be more to tell each minute: it would wait for ever."""
    strict = delivering(email_per_minute=1, delivery_concurrency=0)
    asked = app.NotificationCreate(event_name="e", title="t", body="", severity="warning")
    with service.paused(), strict.paused():
        for count in (3, 1, 1):
            strict.call(strict.service.intake.ask([app.make_item("alice", asked) for _ in range(count)]))
            sql("UPDATE outbox SET state = 'sent', finished_at = now() WHERE digest IS NULL")
            for statement in NEXT_MINUTE:
                sql(statement)
        [(place,)] = sql("SELECT available_at FROM outbox WHERE digest = 'overflow'")
        for _ in range(3):
            strict.call(strict.service.worker.db.run("update_due_messages"))
        token = "SELECT available_at, token_minute = date_trunc('minute', now()) FROM outbox WHERE digest = 'overflow'"
        assert sql(token) == [(place, True)]
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["4 notifications"]


def test_a_digest_that_is_folded_takes_along_what_was_skipped_in_it(
    mail_to_alice: None, burst: Any, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    """Else its record would name a message that is gone, and outlive it."""
    burst(5)
    drain()
    [skipped] = burst(1, batch_key="k")
    [waiting] = alice.get("/api/outbox").json()["outbox"]
    assert alice.post(f"/api/outbox/{waiting['id']}/skip").status_code == 200
    burst(1, batch_key="k")
    sql("UPDATE outbox SET available_at = now() WHERE digest = 'key:k' OR digest LIKE 'skipped:%'")
    drain()
    assert sql("SELECT digest FROM outbox WHERE state = 'open'") == [("overflow",)]
    carried = sql(
        "SELECT d.status FROM deliveries d JOIN outbox o ON o.user_id = d.user_id AND o.id = d.message_id"
        " WHERE o.digest = 'overflow' ORDER BY 1"
    )
    assert carried == [("cancelled",), ("queued",)]
    [told] = alice.get(f"/api/notifications/{skipped}").json()["deliveries"]
    assert told["status"] == "cancelled"
