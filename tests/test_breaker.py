"""The breaker: a provider that fails is left alone, its messages wait unharmed, and nobody else is slowed."""

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, app, eventually, took
from peers import HANG, Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
PAUSED = "SELECT extract(epoch FROM paused_until - now())::float8 FROM breakers WHERE provider = %s"
PROBE = "UPDATE breakers SET paused_until = now() WHERE paused_until IS NOT NULL"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(channel_timeout_seconds=1, webhook_per_minute=0)


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


@pytest.fixture
def burst(api: httpx.Client) -> Callable[..., None]:
    def send(count: int, **fields: Any) -> None:
        usual = {"user_id": "alice", "event_name": "e", "title": "t", "body": "", "severity": "warning"}
        reply = api.post("/api/notifications/batch", json={"notifications": [usual | fields] * count})
        assert reply.status_code == 201, reply.text

    return send


def states(sql: Sql, channel: str = "email") -> dict[str, int]:
    return dict(sql("SELECT state, count(*) FROM outbox WHERE channel = %s GROUP BY 1", channel))


def test_500_mails_survive_a_server_that_is_down_and_nothing_else_is_slowed(
    service: Running,
    burst: Any,
    api: httpx.Client,
    post: Post,
    mailbox: Mailbox,
    hookbox: Hookbox,
    sql: Sql,
    drain: Any,
) -> None:
    before = took(post, 20)
    mailbox.down()
    burst(500)
    delay = eventually(lambda: [seconds for (seconds,) in sql(PAUSED, "email") if seconds])
    assert 25 < delay[0] <= 30
    drain()
    assert sql("SELECT sum(attempts), sum(faults), max(available_at) <= now() FROM outbox") == [(0, 0, True)]
    assert sum(states(sql).values()) == 500 and set(states(sql)) <= {"open", "pending"}

    api.post("/api/webhooks", json={"url": hookbox.url})
    ids: list[str] = []
    during = took(lambda: ids.append(post(severity="warning", user_id="bob")["id"]), 20)
    assert during < 4 * before, "in-app is as fast as ever"
    hookbox.wait(20)
    assert {hit.json["data"]["id"] for hit in hookbox.requests} == set(ids)
    [[told]] = [[b for b in api.get("/api/stats").json()["breakers"] if b["provider"] == "email"]]
    assert told["paused_until"] and told["faults"] >= 10

    for _ in range(2):  # a probe finds it still down: one message, no attempt
        sequences = sql("SELECT sum(claim_seq) FROM outbox")[0][0]
        sql(PROBE)
        eventually(
            lambda: sql(PAUSED, "email")[0][0] > 0 and not sql("SELECT 1 FROM outbox WHERE state = 'sending'")
        )
        drain()
        assert sql("SELECT sum(claim_seq), sum(attempts) FROM outbox WHERE channel = 'email'") == [
            (sequences + 1 - 20, 0)
        ]
    mailbox.up()
    sql(PROBE)
    eventually(lambda: len(mailbox.messages) == 500, 30)
    drain()
    assert states(sql) == {"sent": 500}
    assert sql("SELECT sum(attempts) FROM outbox") == [(0,)]
    assert len({letter.message["Message-ID"] for letter in mailbox.messages}) == 500
    assert sql("SELECT faults, paused_until FROM breakers WHERE provider = 'email'") == [(0, None)]


def test_nine_faults_are_ordinary_failures_and_the_tenth_gives_all_ten_back(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    mailbox.always("GREETING", "554 5.3.2 not now")
    for turn in range(1, 10):
        post(severity="warning")
        drain()
        assert sql("SELECT faults, paused_until FROM breakers") == [(turn, None)]
    assert sql("SELECT sum(attempts), bool_and(available_at > now()) FROM outbox") == [(9, True)]
    post(severity="warning")
    eventually(lambda: sql(PAUSED, "email")[0][0])
    drain()
    assert sql("SELECT sum(attempts), count(*), bool_and(available_at <= now()) FROM outbox") == [
        (0, 10, True)
    ]


def test_any_other_answer_ends_the_row(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    for answers in (["554 no"] * 9, [None], ["554 no"] * 9):
        mailbox.down()  # ends the idle connection, which would not be greeted again
        mailbox.up()
        for answer in answers:
            mailbox.always("GREETING", answer)
            post(severity="warning")
            drain()
    assert sql("SELECT faults, paused_until FROM breakers") == [(9, None)]


@pytest.mark.parametrize(
    ("place", "answer"), [("RCPT", "550 5.1.1 no"), ("DATA", "451 4.3.0 no"), ("MAIL", "550 no")]
)
def test_what_is_said_of_a_single_mail_is_no_fault_of_the_server(
    burst: Any, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], place: str, answer: str
) -> None:
    mailbox.always(place, answer)
    burst(15)
    drain()
    assert sql("SELECT 1 FROM breakers WHERE faults > 0") == []


def test_a_server_that_accepts_and_says_nothing_is_a_fault(
    burst: Any, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    mailbox.always("GREETING", HANG)
    burst(12)
    eventually(lambda: [1 for (seconds,) in sql(PAUSED, "email") if seconds])
    drain()
    assert sql("SELECT sum(attempts) FROM outbox") == [(0,)]


def test_messages_that_need_no_sending_do_not_use_up_the_probe(
    burst: Any, alice: httpx.Client, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    """Twenty read ones stand before the one that is still to be sent."""
    mailbox.down()
    burst(20)
    eventually(lambda: [1 for (seconds,) in sql(PAUSED, "email") if seconds])
    drain()
    assert alice.patch("/api/notifications", json={"all": True}).json()["updated"] == 20
    post(severity="warning")
    mailbox.up()
    sql(PROBE)
    mailbox.wait(1)
    drain()
    assert states(sql) == {"void": 20, "sent": 1}


def test_hosts_and_channels_rest_each_for_itself(
    service: Running, api: httpx.Client, burst: Any, reach: Any, alice: httpx.Client, mailbox: Mailbox, hookbox: Hookbox,
    pushbox: Pushbox, sql: Sql, drain: Callable[[], None],
) -> None:  # fmt: skip
    """A receiver that is down pauses neither another receiver on the same machine, nor mail, nor push."""
    reach("alice", push_enabled=True)
    alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    other = Hookbox()
    try:
        for box in (hookbox, other):
            api.post("/api/webhooks", json={"url": box.url})
        other.down()
        burst(15)
        drain()
        eventually(lambda: sql("SELECT 1 FROM breakers WHERE paused_until IS NOT NULL"))
        drain()
        assert len(hookbox.requests) == len(mailbox.messages) == len(pushbox.messages) == 15
        assert sql("SELECT provider FROM breakers WHERE paused_until IS NOT NULL") == [
            (f"webhook:127.0.0.1:{other.port}",)
        ]
        other.up()
        sql(PROBE)
        other.wait(15)
        drain()
        assert states(sql, "webhook") == {"sent": 30}
    finally:
        other.close()


def test_a_slow_provider_leaves_room_for_the_others(
    api: httpx.Client, burst: Any, mailbox: Mailbox, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    """Forty mails hang for their whole time; webhooks go on beside them."""
    mailbox.always("DATA", HANG)
    burst(40)
    api.post("/api/webhooks", json={"url": hookbox.url})
    eventually(lambda: sql("SELECT 1 FROM outbox WHERE state = 'sending'"))
    started = time.monotonic()
    burst(40, user_id="bob")
    hookbox.wait(40)
    assert time.monotonic() - started < 2
    assert sql("SELECT count(*) FROM outbox WHERE state = 'sending' AND channel = 'email'")[0][0] <= 4
    mailbox.always("DATA")


def test_many_slow_hosts_leave_room_for_the_other_channels_and_for_each_other(
    service: Running, api: httpx.Client, burst: Any, sql: Sql
) -> None:
    """Of sixteen slots webhooks get six, a host with none under way before one with some; mail has its four."""
    hosts = [f"webhook:h{number}.example" for number in range(5)]
    for host in hosts:
        api.post("/api/webhooks", json={"url": f"https://{host.partition(':')[2]}/"})
    with service.paused():
        burst(5)
        worker = service.service.worker.db
        claim = functools.partial(worker.many, "claim_messages", app.outgoing, room=16, share=4, mail=True)
        first = service.call(claim(busy="{}"))
        assert collections.Counter(message.channel for message in first) == {"webhook": 6, "email": 4}
        assert {message.provider for message in first} == {*hosts, "email"}
        busy = collections.Counter(message.provider for message in first)
        assert service.call(claim(busy=app.encode(busy))) == []
        later = service.call(claim(busy=app.encode({hosts[0]: 3, hosts[1]: 1})))
        webhooks = [message.provider for message in later if message.channel == "webhook"]
        assert len(webhooks) == 2 and not {hosts[0], hosts[1]} & set(webhooks)
        sql("DELETE FROM outbox")


def test_a_critical_one_overtakes_what_waits_for_the_same_server(
    service: Running, burst: Any, post: Any, mailbox: Mailbox, drain: Any
) -> None:
    with service.paused():
        burst(20)
        fire = post(title="Fire", severity="critical")
    drain()
    assert len(mailbox.messages) == 21
    first = mailbox.messages[:4]  # as many are under way at once
    assert any(fire["id"] in letter.text for letter in first)


def test_a_critical_one_finds_a_slot_that_others_cannot_fill(
    service: Running, burst: Any, post: Any, sql: Sql
) -> None:
    """Mails that hang until their timeout may fill the share of their server."""
    with service.paused():
        burst(9)
        post(title="Fire", severity="critical")
        post(title="Flood", severity="critical")
        claim = functools.partial(
            service.service.worker.db.many, "claim_messages", app.outgoing, room=12, share=4, mail=True
        )
        assert [line.text for line in texts(service.call(claim(busy='{"email": 4}')))] == ["Fire"]
        assert service.call(claim(busy='{"email": 5}')) == []
        assert {line.text for line in texts(service.call(claim(busy='{"email": 2}')))} > {"Flood"}
        sql("DELETE FROM outbox")


def texts(claimed: list[Any]) -> list[app.Line]:
    return [line for message in claimed for line in message.lines]


def test_a_paused_providers_messages_ask_for_no_token_until_a_probe_may_go(
    delivering: Callable[..., Running], post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    strict = delivering(email_per_minute=5, delivery_concurrency=0)
    ask = functools.partial(strict.service.worker.db.run, "update_due_messages")
    sql("INSERT INTO breakers VALUES ('email', 10, now() + interval '1 hour')")
    for number in range(3):
        post(title=str(number), severity="warning")
    sql("UPDATE outbox SET token_minute = now() - interval '2 minutes'")
    assert strict.call(ask()) == 0
    sql("UPDATE breakers SET paused_until = now()")
    drain()
    assert sorted(letter.subject for letter in mailbox.messages) == ["0", "1", "2"]
