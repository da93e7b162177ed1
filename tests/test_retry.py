"""Retries: what may work later is tried again, later each time and not all at once; what cannot is dead at once."""

import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from email.utils import formatdate
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import Running, app, eventually
from peers import DROP, HANG, Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
BASE, MOST = 60, 1800
STATE = "SELECT state, attempts, extract(epoch FROM available_at - now())::float8, last_error FROM outbox"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(max_attempts=7, channel_timeout_seconds=1)


@pytest.fixture
def again(sql: Sql, drain: Callable[[], None]) -> Callable[[], None]:
    """Let the time of all retries come."""

    def age() -> None:
        sql("UPDATE outbox SET available_at = now() WHERE state = 'pending'")
        drain()

    return age


def test_the_delay_doubles_up_to_its_most_and_the_last_failure_ends_it(
    api: httpx.Client,
    post: Post,
    hookbox: Hookbox,
    sql: Sql,
    drain: Callable[[], None],
    again: Callable[[], None],
) -> None:
    api.post("/api/webhooks", json={"url": hookbox.url})
    hookbox.always("/", 503)
    post(severity="warning")
    drain()
    for failure in range(1, 7):
        [(state, attempts, delay, error)] = sql(STATE)
        assert (state, attempts, error) == ("pending", failure, "503")
        most = min(MOST, BASE * 2**failure)
        assert most / 2 - 5 < delay <= most
        again()
    [(state, attempts, _, error)] = sql(STATE)
    assert (state, attempts, error) == ("failed", 7, "503")
    assert sql("SELECT status, last_error FROM deliveries") == [("failed", "503")]
    assert len(hookbox.requests) == 7
    assert len({hit.headers["webhook-id"] for hit in hookbox.requests}) == 1


def test_5000_that_fail_at_once_come_back_over_the_whole_upper_half(service: Running, sql: Sql) -> None:
    sql("INSERT INTO outbox (user_id, id, channel, target, state, available_at, claim_seq, provider)"
        " SELECT 'u' || n, gen_random_uuid(), 'webhook', gen_random_uuid(), 'sending', now() + interval '1 minute', 1,"
        " 'webhook:x' FROM generate_series(1, 5000) AS n")  # fmt: skip
    rows = sql("SELECT user_id, id FROM outbox")
    results = [{"user_id": u, "id": id, "claim_seq": 1, "verdict": "retry", "error": "503"} for u, id in rows]
    [written] = service.call(service.service.worker.db.many("finish_messages", results=app.encode(results)))
    assert written["times"] == 5000
    delays = [
        delay for (delay,) in sql("SELECT extract(epoch FROM available_at - now())::float8 FROM outbox")
    ]
    assert 50 < min(delays) < 65 and 110 < max(delays) <= 120
    seconds = sql("SELECT count(*) FROM outbox GROUP BY date_trunc('second', available_at)")
    assert max(seconds) < (200,), "83 a second are expected"


HOPELESS = [400, 401, 403, 404, 405, 409, 413, 422, 301, 302, 308]
PASSING = [408, 425, 429, 500, 502, 503, 504, 599]


def test_the_answer_decides_how_often_a_webhook_is_tried(
    api: httpx.Client,
    post: Post,
    hookbox: Hookbox,
    sql: Sql,
    drain: Callable[[], None],
    again: Callable[[], None],
) -> None:
    """Everything is tried at least three times; what looks hopeless no more than that."""
    for answer in (*HOPELESS, *PASSING, DROP):
        hookbox.always(
            f"/{answer}", answer if answer not in (301, 302, 308) else (answer, {"Location": "/200"})
        )
        api.post("/api/webhooks", json={"url": f"{hookbox.url}/{answer}"})
    post(severity="warning")
    drain()
    for _ in range(2):
        assert sql("SELECT DISTINCT state FROM outbox") == [("pending",)]
        again()
    ended = "SELECT w.url FROM outbox o JOIN webhook_endpoints w ON w.id = o.target WHERE o.state = 'failed'"
    assert {url.rpartition("/")[2] for (url,) in sql(ended)} == {str(code) for code in HOPELESS}
    for _ in range(4):
        again()
    tries = {url.rpartition("/")[2]: n for url, n in sql("SELECT w.url, o.attempts FROM outbox o"
             " JOIN webhook_endpoints w ON w.id = o.target")}  # fmt: skip
    assert tries == {str(code): 3 for code in HOPELESS} | {str(code): 7 for code in (*PASSING, DROP)}
    assert sql("SELECT DISTINCT status FROM deliveries") == [("failed",)]
    assert not any(hit.path == "/200" for hit in hookbox.requests), "a redirect is not followed"
    assert sql("SELECT count(*) FROM webhook_endpoints WHERE disabled_at IS NOT NULL") == [(0,)]


def test_retry_after_is_honoured_up_to_a_day(
    api: httpx.Client, post: Post, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    date = formatdate(time.time() + 600, usegmt=True)
    waits = {
        "7": (2, 7), "3600": (3580, 3600), "9999999": (86_380, 86_400), date: (580, 601), "soon": (50, 120), "0": (-99, 1),
    }  # fmt: skip
    for number, header in enumerate(waits):
        hookbox.always(f"/{number}", (429, {"Retry-After": header}))
        api.post("/api/webhooks", json={"url": f"{hookbox.url}/{number}"})
    post(severity="warning")
    hookbox.wait(6)
    eventually(lambda: sql("SELECT count(*) FROM outbox WHERE state = 'sending'") == [(0,)])
    delays = dict(sql("SELECT right(w.url, 1), extract(epoch FROM available_at - now())::float8 FROM outbox o"
                      " JOIN webhook_endpoints w ON w.id = o.target"))  # fmt: skip
    for number, (least, most) in enumerate(waits.values()):
        assert least < delays[str(number)] <= most


PUSH_ENDS = {404: 1, 410: 1, 413: 1, 400: 3, 403: 3, 401: 3, 301: 3, 429: 7, 500: 7, 503: 7, DROP: 7}


def test_a_push_subscription_that_is_gone_is_deleted_and_nothing_else_deletes_one(
    reach: Any,
    alice: httpx.Client,
    post: Post,
    pushbox: Pushbox,
    sql: Sql,
    drain: Callable[[], None],
    again: Any,
) -> None:
    reach("alice", push_enabled=True)
    paths = {}
    for answer in (*PUSH_ENDS, 201):
        subscription = pushbox.subscription()
        alice.post("/api/push/subscriptions", json=subscription.to_json())
        paths[answer] = subscription.endpoint.removeprefix(pushbox.url)
        pushbox.always(paths[answer], answer)
    id = post(severity="warning")["id"]
    drain()
    sql(
        "DELETE FROM outbox o USING deliveries d WHERE o.id = d.message_id AND d.notification_id <> %s", id
    )  # notices
    while sql("SELECT 1 FROM outbox WHERE state = 'pending'"):
        again()
    left = {
        endpoint.removeprefix(pushbox.url) for (endpoint,) in sql("SELECT endpoint FROM push_subscriptions")
    }
    assert left == set(paths.values()) - {paths[404], paths[410]}
    ends = "SELECT o.attempts, d.status, count(*) FROM deliveries d JOIN outbox o ON o.id = message_id GROUP BY 1, 2"
    assert Counter({(attempts, status): n for attempts, status, n in sql(ends)}) == Counter(
        [(attempts, "failed") for attempts in PUSH_ENDS.values()] + [(0, "sent")]
    )
    for answer, least in PUSH_ENDS.items():
        topics = {hit.headers["Topic"] for hit in pushbox.requests if hit.path == paths[answer]}
        tries = [hit for hit in pushbox.requests if hit.path == paths[answer]]
        assert len(tries) >= least and len(topics) <= 2, "its own, and that of a notice"


MAIL_ENDS = [
    ("MAIL", "451 4.3.0 later", 7), ("RCPT", "450 4.2.1 later", 7), ("DATA", "452 4.3.1 full", 7), ("DATA", DROP, 7),
    ("MAIL", "550 5.7.1 no", 1), ("RCPT", "550 5.1.1 unknown", 1), ("DATA", "554 5.6.0 no", 1),
]  # fmt: skip


def test_a_mail_is_tried_again_unless_the_server_said_never(
    reach: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], again: Any
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    for place, answer, ends_after in MAIL_ENDS:
        mailbox.always(place, answer)
        id = post(severity="warning")["id"]
        drain()
        while sql("SELECT 1 FROM outbox WHERE state = 'pending'"):
            again()
        mailbox.always(place)
        ends = "SELECT o.state, o.attempts, d.status FROM deliveries d JOIN outbox o ON o.id = message_id"
        assert sql(f"{ends} WHERE notification_id = %s", id) == [("failed", ends_after, "failed")], (
            place,
            answer,
        )
    assert not mailbox.messages


def test_a_server_that_takes_for_ever_costs_an_attempt(
    reach: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], again: Any
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    mailbox.script("DATA", HANG)
    post(severity="warning")
    drain()
    assert sql("SELECT state, attempts, last_error FROM outbox") == [("pending", 1, "timed out")]
    again()
    assert len(mailbox.messages) == 1


def test_success_after_failures_keeps_their_number_and_the_messages_identity(
    reach: Any,
    post: Post,
    mailbox: Mailbox,
    sql: Sql,
    drain: Callable[[], None],
    again: Any,
    alice: httpx.Client,
) -> None:
    """The server takes the mail but the word of it is lost: a second copy must be known as the same mail."""
    reach("alice", email="alice@example.org", email_enabled=True)
    mailbox.script("DATA", "451 4.3.0 later", "lose")
    id = post(severity="warning")["id"]
    drain()
    again()
    again()
    first, second = mailbox.messages
    assert first.message["Message-ID"] == second.message["Message-ID"]
    assert first.message["Date"] == second.message["Date"]
    [delivery] = alice.get(f"/api/notifications/{id}").json()["deliveries"]
    assert (delivery["status"], delivery["attempts"]) == ("sent", 2)
    assert delivery["sent_at"] and delivery["last_error"] is None


def test_the_providers_words_are_for_admins_only_and_200_characters_at_most(
    reach: Any, post: Post, mailbox: Mailbox, api: httpx.Client, alice: httpx.Client, sql: Sql, drain: Any
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    mailbox.script("DATA", "554 5.6.0 " + "no " * 100)
    id = post(severity="warning")["id"]
    drain()
    [delivery] = alice.get(f"/api/notifications/{id}").json()["deliveries"]
    assert delivery["status"] == "failed" and delivery["last_error"] is None
    [seen] = api.get("/api/deliveries?status=failed").json()["deliveries"]
    assert seen["last_error"].startswith("554 5.6.0 no no") and len(seen["last_error"]) <= 200


def test_a_result_is_written_down_even_when_its_error_holds_what_json_cannot(
    service: Running, sql: Sql
) -> None:
    """One such text must not hold up the results of all others."""
    worker, id = service.service.worker, uuid4()
    sql("INSERT INTO outbox (user_id, id, channel, target, state, available_at, claim_seq, provider)"
        " VALUES ('u', %s, 'webhook', %s, 'sending', now() + interval '1 minute', 1, 'webhook:x')", id, id)  # fmt: skip

    async def strange(message: app.Outgoing) -> app.Outcome:
        return app.Outcome("retry", "\x00 \ud800 \x1b[2J end")

    message = app.Outgoing(
        id, "u", id, 1, "webhook", "webhook:x", "en", app.datetime.now(app.UTC), {}, 1, None, []
    )
    worker.outbound.send_webhook = strange
    service.call(worker.deliver(message))
    eventually(lambda: sql("SELECT 1 FROM outbox WHERE state = 'pending'"))
    assert sql("SELECT attempts, last_error LIKE '%%end' FROM outbox") == [(1, True)]
    assert timedelta(seconds=50) < sql("SELECT available_at - now() FROM outbox")[0][0]
