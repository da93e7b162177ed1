"""Leases: a claimed message belongs to its worker for a while; who comes late changes nothing, who dies loses nothing."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from conftest import SECRET, Running, app, eventually
from peers import HANG, Hookbox, Mailbox, outgoing

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
END_LEASES = "UPDATE outbox SET available_at = now() - interval '1 second' WHERE state = 'sending'"
SEEN = "SELECT o::text, d::text FROM outbox o JOIN deliveries d ON d.message_id = o.id ORDER BY 1, 2"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(channel_timeout_seconds=2)


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


@pytest.fixture
def worker(service: Running) -> Callable[..., list[dict[str, Any]]]:
    """Another worker on the same database, step by step: its statements, and what they give."""

    def run(name: str, **parameters: Any) -> Any:
        usual = {"room": 100, "share": 100, "busy": "{}", "mail": True}
        wanted = app.QUERIES[name].parameters
        given = {key: value for key, value in usual.items() if key in wanted} | parameters
        db = service.service.worker.db
        if name == "claim_messages":
            return service.call(db.many(name, app.outgoing, **given))
        if name == "finish_messages":
            return sum(row["times"] for row in service.call(db.many(name, **given)))
        return service.call((db.run if name == "release_messages" else db.many)(name, **given))

    return run


def result(message: app.Outgoing, verdict: str, error: str = "") -> dict[str, Any]:
    key = {"user_id": message.user_id, "id": message.id, "claim_seq": message.claim_seq}
    return key | {"verdict": verdict, "error": error, "retry_after": None, "email": "alice@example.org"}


def test_a_worker_frozen_beyond_its_lease_changes_nothing(
    service: Running, worker: Any, post: Post, api: httpx.Client, sql: Sql
) -> None:
    """A hundred times: it wakes while another one sends, after that one sent it, failed, or waits to try again."""
    ends = ["sending", "sent", "retry", "dead", "released"]
    with service.paused():
        ids = [post(severity="warning", title=f"{turn}")["id"] for turn in range(20)]
        assert len(set(ids)) == 20
        for end in ends:
            sql("UPDATE outbox SET state = 'open', available_at = now(), finished_at = NULL")
            sql("UPDATE deliveries SET status = 'queued'")
            frozen = worker("claim_messages")
            assert len(frozen) == 20
            sql(END_LEASES)
            owner = worker("claim_messages")
            assert {m.id for m in owner} == {m.id for m in frozen}
            if end == "released":
                worker("release_messages", results=app.encode([result(m, "sent") for m in owner]))
            elif end != "sending":
                assert worker("finish_messages", results=app.encode([result(m, end) for m in owner])) == 20
            before = sql(SEEN)
            for verdict in ("sent", "retry", "dead", "gone", "bounced", "fault"):
                assert not worker("finish_messages", results=app.encode([result(m, verdict) for m in frozen]))
            worker("release_messages", results=app.encode([result(m, "") for m in frozen]))
            assert sql(SEEN) == before
    assert sql("SELECT (SELECT count(*) FROM breakers) + (SELECT count(*) FROM suppressions)") == [(0,)]


def test_results_that_come_too_late_are_counted(
    service: Running, post: Post, mailbox: Mailbox, api: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    def lost() -> float:
        return app.METRICS["leases_lost"]._value.get()

    before = lost()
    mailbox.script("DATA", HANG)
    post(severity="warning")
    eventually(lambda: sql("SELECT 1 FROM outbox WHERE state = 'sending'"))
    sql(END_LEASES)
    eventually(lambda: mailbox.messages)
    assert eventually(lambda: lost() - before) == 1
    drain()
    assert sql("SELECT state, attempts, crashes, claim_seq FROM outbox") == [("sent", 0, 0, 2)]
    assert len(mailbox.messages) == 1


def test_a_claim_belongs_to_its_worker_until_the_lease_ends(
    service: Running, worker: Any, post: Post, sql: Sql
) -> None:
    with service.paused():
        post(severity="warning")
        [message] = worker("claim_messages")
        assert worker("claim_messages") == []
        assert sql("SELECT available_at > now() + interval '59 seconds' FROM outbox") == [(True,)]
        sql(END_LEASES)
        [again] = worker("claim_messages")
        assert (again.id, again.claim_seq) == (message.id, message.claim_seq + 1)


def test_two_workers_never_hold_the_same_message(
    service: Running, post: Post, api: httpx.Client, sql: Sql
) -> None:
    """Eight at once over 400 messages: each message is claimed exactly once."""
    claimed: list[UUID] = []

    def take() -> None:
        while True:
            given = {"room": 7, "share": 7, "busy": "{}", "mail": True}
            rows = service.call(service.service.worker.db.many("claim_messages", app.outgoing, **given))
            if not rows:
                return
            claimed.extend(message.id for message in rows)

    with service.paused():
        body = {"user_id": "alice", "event_name": "e", "title": "t", "body": "", "severity": "warning"}
        assert api.post("/api/notifications/batch", json={"notifications": [body] * 400}).status_code == 201
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(claimed) == len(set(claimed)) == 400


# ─── Crashes ───


def test_a_message_that_ended_its_worker_three_times_runs_alone(
    service: Running, post: Post, api: httpx.Client, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    api.post("/api/webhooks", json={"url": hookbox.url})
    worker, outbound, together = service.service.worker, service.service.outbound, []
    send = outbound.send_webhook

    async def watch(message: app.Outgoing) -> app.Outcome:
        together.append((str(message.lines[0].id), len(worker.in_flight)))
        return await send(message)

    outbound.send_webhook = outbound.send_email = watch
    with service.paused():
        ids = [post(severity="warning", user_id="bob")["id"] for _ in range(12)]
        suspect = ids[5]
        sql("UPDATE outbox o SET state = 'sending', crashes = 2, available_at = now() FROM deliveries d"
            " WHERE d.message_id = o.id AND d.notification_id = %s", suspect)  # fmt: skip
    drain()
    assert dict(together)[suspect] == 1
    assert {id for id, _ in together} == set(ids)
    assert max(count for _, count in together) > 1
    assert sql("SELECT DISTINCT state, crashes FROM outbox") == [("sent", 0)]


def test_a_suspect_gets_its_turn_under_unceasing_load(
    service: Running, post: Post, mailbox: Mailbox, sql: Sql
) -> None:
    outbound, load = service.service.outbound, True

    async def slow(message: app.Outgoing) -> app.Outcome:
        await app.asyncio.sleep(0.2)
        return app.Outcome("sent")

    outbound.send_email = slow
    with service.paused():
        suspect = post(severity="warning")["id"]
        sql("UPDATE outbox SET state = 'sending', crashes = 5, available_at = now() - interval '9 seconds'")

    def keep_busy() -> None:
        while load:
            post(severity="warning")

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        eventually(
            lambda: sql("SELECT 1 FROM deliveries WHERE notification_id = %s AND status = 'sent'", suspect)
        )
    finally:
        load = False
        thread.join()


def test_a_suspect_that_may_not_leave_yet_holds_nobody_up(
    service: Running, worker: Any, post: Post, api: httpx.Client, hookbox: Hookbox, sql: Sql
) -> None:
    api.post("/api/webhooks", json={"url": hookbox.url})
    with service.paused():
        post(severity="warning")
        sql("UPDATE outbox SET state = 'sending', crashes = 5, available_at = now() - interval '1 minute'"
            " WHERE channel = 'email'")  # fmt: skip
        assert worker("claim_messages", busy='{"email": 1}') == []
        sql("INSERT INTO breakers VALUES ('email', 10, now() + interval '20 seconds')")
        assert [message.channel for message in worker("claim_messages", busy='{"email": 1}')] == ["webhook"]


def test_at_the_tenth_crash_a_message_is_dead_while_others_flow(
    service: Running, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], api: httpx.Client
) -> None:
    with service.paused():
        ids = [post(severity="warning")["id"] for _ in range(3)]
        sql("UPDATE outbox o SET state = 'sending', crashes = 9, available_at = now() FROM deliveries d"
            " WHERE d.message_id = o.id AND d.notification_id = %s", ids[1])  # fmt: skip
    drain()
    ends = dict(sql("SELECT notification_id::text, status FROM deliveries"))
    assert ends == {ids[0]: "sent", ids[1]: "failed", ids[2]: "sent"}
    [dead] = api.get("/api/deliveries?status=failed").json()["deliveries"]
    assert dead["last_error"] == "it ended its worker ten times"
    assert len(mailbox.messages) == 2


def test_leases_that_run_out_are_counted_in_a_row_and_a_finished_try_ends_the_row(
    service: Running, worker: Any, post: Post, sql: Sql
) -> None:
    with service.paused():
        post(severity="warning")
        for crashes in (0, 1, 2):
            [message] = worker("claim_messages")
            assert sql("SELECT crashes FROM outbox") == [(crashes,)]
            sql(END_LEASES)
        assert worker("claim_messages", busy='{"email": 1}') == [], "from here on it runs alone"
        [message] = worker("claim_messages")
        assert message.alone
        assert sql("SELECT crashes, attempts FROM outbox") == [(3, 0)]
        worker("finish_messages", results=app.encode([result(message, "retry")]))
        assert sql("SELECT state, crashes, attempts FROM outbox") == [("pending", 0, 1)]


@pytest.fixture
def process(database: str, tmp_path: Path, mailbox: Mailbox) -> Any:
    """The service as a process of its own, which can be killed."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], str]:
        environ = os.environ | {
            "DATABASE_URL": database, "BELLHOP_HOME": str(tmp_path), "BELLHOP_SECRET": SECRET, "BELLHOP_PORT": "0",
            "BELLHOP_SMTP_URL": mailbox.url, "BELLHOP_MAIL_FROM": "bell@example.org", "BELLHOP_POLL_SECONDS": "0.1",
            "BELLHOP_CHANNEL_TIMEOUT_SECONDS": "2",
        }  # fmt: skip
        one = subprocess.Popen([sys.executable, str(app.HERE / "app.py")], env=environ, stdout=-1, text=True)
        started.append(one)
        assert one.stdout
        line = one.stdout.readline()
        assert "listening on" in line, line
        return one, line.split()[-1]

    yield start
    for one in started:
        if one.poll() is None:
            one.kill()
        one.wait(10)
        assert one.stdout
        one.stdout.close()


def test_a_crash_in_the_middle_of_sending_loses_nothing(
    service: Running, process: Any, post: Post, api: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Any
) -> None:
    with service.paused():
        one, _ = process()
        mailbox.script("DATA", *[HANG] * 4)
        ids = [post(severity="warning", title=f"{number}")["id"] for number in range(8)]
        eventually(
            lambda: (
                len(sql("SELECT 1 FROM outbox WHERE state = 'sending'")) == 4 and not mailbox.scripted["DATA"]
            )
        )
        one.kill()
        one.wait(10)
        left = sql("SELECT count(*) FROM outbox WHERE state = 'sending'")
        assert left == [(4,)]
    eventually(lambda: sql("SELECT count(*) FROM outbox WHERE state = 'sent'") == [(4,)])
    assert sql("SELECT count(*) FROM outbox WHERE state = 'sending'") == left, (
        "the dead worker's until its lease ends"
    )
    sql(END_LEASES)
    drain()
    assert sorted(letter.subject for letter in mailbox.messages) == [str(number) for number in range(8)]
    assert sql("SELECT status, count(*) FROM deliveries GROUP BY 1") == [("sent", 8)]
    assert len(ids) == 8


def test_told_to_stop_it_finishes_what_ends_in_time_and_gives_back_the_rest_without_a_failure(
    service: Running, process: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    with service.paused():
        one, _ = process()
        mailbox.script("DATA", HANG, HANG)
        for _ in range(2):
            post(severity="warning")
        eventually(lambda: len(mailbox.open) >= 2)
        started = time.monotonic()
        one.send_signal(signal.SIGTERM)
        post(severity="warning")
        assert one.wait(15) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 10
        assert sql("SELECT state, attempts, crashes, available_at <= now() FROM outbox ORDER BY state") in (
            [("open", 0, 0, True)] + [("pending", 1, 0, False)] * 2,
            [("pending", 0, 0, True)] + [("pending", 1, 0, False)] * 2,  # claimed meanwhile, and given back
            [("pending", 1, 0, False)] * 2 + [("sent", 0, 0, True)],
        )
    drain()


def test_what_is_claimed_while_it_is_told_to_stop_is_given_back_unsent(
    service: Running, post: Post, mailbox: Mailbox, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = service.service.worker
    many = worker.db.many

    async def told_to_stop_meanwhile(name: str, *kind: Any, **parameters: Any) -> list[Any]:
        rows = await many(name, *kind, **parameters)
        worker.stopping = worker.stopping or (name == "claim_messages" and bool(rows))
        return rows

    monkeypatch.setattr(worker.db, "many", told_to_stop_meanwhile)
    post(severity="critical")
    eventually(
        lambda: sql("SELECT state, claim_seq, attempts, crashes FROM outbox") == [("pending", 1, 0, 0)]
    )
    assert not mailbox.messages and not worker.in_flight


def test_a_mail_under_way_is_not_cut_off_for_a_batch_that_takes_its_time(
    service: Running, post: Post, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop that gives tokens waits for the batch; the end waits for the mail alone."""
    worker = service.service.worker

    async def send(_: app.Outgoing) -> app.Outcome:
        await asyncio.sleep(1.2 * app.PATIENCE)
        return app.Outcome("sent")

    async def stop() -> None:
        async with worker.intake.turn:
            await worker.stop()

    monkeypatch.setattr(worker.outbound, "send", send)
    post(severity="critical")
    eventually(lambda: worker.in_flight)
    service.call(stop())
    assert sql("SELECT state, attempts FROM outbox") == [("sent", 0)]


def test_what_was_claimed_beside_a_suspect_is_not_begun_after_the_end(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    bell, begun = service.service, list[str]()
    own = app.Worker(bell.settings, bell.db, bell.intake, bell.outbound)
    claimed = [
        outgoing("email", {"email": "a@b.c"}, user_id=name, alone=name == "suspect")
        for name in ("suspect", "next")
    ]
    released = list[dict[str, Any]]()

    async def many(name: str, *_: Any, **parameters: Any) -> list[Any]:
        if name == "release_messages":
            released.extend(json.loads(parameters["results"]))
            return [len(released)]
        return claimed if name == "claim_messages" else []

    async def deliver(message: app.Outgoing) -> None:
        begun.append(message.user_id)
        own.stopping = True
        own.in_flight.pop(message)

    monkeypatch.setattr(own.db, "many", many)
    monkeypatch.setattr(own, "deliver", deliver)
    assert service.call(own.claim()) == 2
    assert begun == ["suspect"] and [each["user_id"] for each in released] == ["next"]


def test_what_is_under_way_at_the_end_is_released(
    service: Running, delivering: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Any, monkeypatch: Any
) -> None:
    """Its attempt would take longer than the process has left."""
    monkeypatch.setattr(app, "STOP_SECONDS", 0.3)
    with service.paused():
        other = delivering()
        mailbox.script("DATA", HANG, HANG)
        for _ in range(2):
            post(severity="warning")
        eventually(lambda: len(sql("SELECT 1 FROM outbox WHERE state = 'sending'")) == 2)
        started = time.monotonic()
        other.stop()
        assert time.monotonic() - started < 4
        rows = sql("SELECT state, attempts, crashes, available_at <= now() FROM outbox")
        assert rows == [("pending", 0, 0, True)] * 2
    drain()
    assert len(mailbox.messages) == 2
