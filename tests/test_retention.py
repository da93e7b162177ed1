"""Retention: what is over and old is forgotten, a bounded number of rows at a time; what is not over stays."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, app, eventually
from peers import Mailbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
AGE = [
    "UPDATE notifications SET created_at = created_at - interval '8 days'",
    "UPDATE outbox SET finished_at = finished_at - interval '8 days'",
    "UPDATE rate_limits SET minute = minute - interval '8 days'",
    # ids are time-ordered; this one is of May 2023
    "UPDATE deliveries SET id = ('01880000-0000' || right(id::text, 23))::uuid",
]
COUNTS = "SELECT (SELECT count(*) FROM notifications), (SELECT count(*) FROM deliveries), (SELECT count(*) FROM outbox)"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(retention_days=7, email_per_minute=1000)


@pytest.fixture
def prune(service: Running) -> Callable[[], None]:
    """Do what the prune loop does every hour."""
    worker = service.service.worker

    def run() -> None:
        before = service.service.loops.tasks["prune"]

        async def again() -> None:
            task = app.asyncio.create_task(worker.prune_turn())
            await app.asyncio.sleep(0.3)
            task.cancel()

        assert not before.done()
        service.call(again())

    return run


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def test_what_is_read_and_sent_long_ago_is_forgotten(
    post: Post, alice: httpx.Client, sql: Sql, drain: Callable[[], None], prune: Callable[[], None]
) -> None:
    for severity in ("info", "warning", "critical"):
        post(severity=severity)
    drain()
    alice.patch("/api/notifications", json={"all": True})
    prune()
    assert sql(COUNTS) == [(3, 3, 2)], "nothing is old yet"
    for statement in AGE:
        sql(statement)
    prune()
    assert sql(COUNTS) == [(0, 0, 0)]
    assert sql("SELECT count(*) FROM rate_limits") == [(0,)]


def test_the_unread_stay_and_so_does_what_is_still_to_leave(
    post: Post, alice: httpx.Client, sql: Sql, drain: Callable[[], None], prune: Callable[[], None]
) -> None:
    unread = post(severity="warning")["id"]
    archived = post()["id"]
    waiting = post(severity="warning", batch_key="k")["id"]
    alice.patch(f"/api/notifications/{archived}", json={"archived": True})
    alice.patch(f"/api/notifications/{waiting}", json={"read": True})
    drain()
    for statement in AGE:
        sql(statement)
    prune()
    assert {id for (id,) in sql("SELECT id::text FROM notifications")} == {unread, waiting}
    assert sql("SELECT notification_id::text, status FROM deliveries") == [(waiting, "queued")]


def test_what_was_suppressed_at_once_is_forgotten_although_its_notification_is_unread(
    post: Post, sql: Sql, drain: Callable[[], None], prune: Callable[[], None]
) -> None:
    post(severity="info")
    prune()
    assert sql(COUNTS) == [(1, 1, 0)]
    for statement in AGE:
        sql(statement)
    prune()
    assert sql(COUNTS) == [(1, 0, 0)]


def test_a_delivery_that_failed_long_ago_is_forgotten_too(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], prune: Callable[[], None]
) -> None:
    mailbox.script("DATA", "554 5.6.0 no")
    post(severity="warning")
    drain()
    for statement in AGE:
        sql(statement)
    prune()
    assert sql(COUNTS) == [(1, 0, 0)]


def test_much_is_forgotten_in_bounded_steps(
    service: Running, sql: Sql, prune: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PRUNE_ROWS", 40)
    sql("INSERT INTO notifications (user_id, id, event_name, title, body, severity, read_at, created_at)"
        " SELECT 'bob', gen_random_uuid(), 'e', 't', '', 'info', now(), now() - interval '1 year'"
        " FROM generate_series(1, 100)")  # fmt: skip
    steps: list[int] = []
    db, usual = service.service.worker.db, service.service.worker.db.run

    async def count(name: str, **parameters: Any) -> int:
        rows = await usual(name, **parameters)
        if name == "prune_notifications":
            steps.append(rows)
        return rows

    monkeypatch.setattr(db, "run", count)
    prune()
    assert steps == [40, 40, 20]
    assert sql("SELECT count(*) FROM notifications WHERE user_id = 'bob'") == [(0,)]


def test_zero_days_keep_everything(
    delivering: Any, post: Post, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    keeper = delivering(retention_days=0, delivery_concurrency=0)
    post(severity="warning")
    post()
    drain()
    alice.patch("/api/notifications", json={"all": True})
    for statement in AGE:
        sql(statement)
    worker = keeper.service.worker
    for name in ("prune_messages", "prune_deliveries", "prune_notifications"):
        assert keeper.call(worker.db.run(name, room=1000)) == 0
    assert sql(COUNTS) == [(2, 2, 1)]


def test_more_days_than_there_have_been_since_1970_keep_everything(
    post: Post, sql: Sql, prune: Callable[[], None], service: Running
) -> None:
    post(severity="info")
    service.service.worker.db.bound["days"] = 36_500
    prune()
    assert sql(COUNTS) == [(1, 1, 0)]


def test_faults_of_a_provider_for_whom_nothing_waits_are_forgotten(
    service: Running, prune: Callable[[], None], mailbox: Mailbox, post: Post, sql: Sql
) -> None:
    mailbox.always("DATA", "451 later")
    post(severity="warning")
    eventually(lambda: sql("SELECT state FROM outbox") == [("pending",)])
    sql(
        "INSERT INTO breakers (provider, faults, paused_until)"
        " VALUES ('email', 3, NULL), ('push:gone.example', 9, NULL), ('push:paused.example', 10, now()),"
        "        ('webhook:old.example', 10, now() - interval '2 hours')"
    )
    prune()
    assert sql("SELECT provider FROM breakers ORDER BY 1") == [("email",), ("push:paused.example",)]


def test_it_happens_by_itself_at_the_start(
    delivering: Any, post: Post, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    post(severity="warning")
    drain()
    alice.patch("/api/notifications", json={"all": True})
    for statement in AGE:
        sql(statement)
    delivering(retention_days=7, delivery_concurrency=0)
    eventually(lambda: sql(COUNTS) == [(0, 0, 0)])


def test_statements_about_many_rows_have_more_patience_than_a_request(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    db, prune = service.service.db, service.service.worker.db.run("prune_rate_limits", room=app.PRUNE_ROWS)
    monkeypatch.setattr(app, "PATIENCE", 1e-6)
    with pytest.raises(TimeoutError):
        service.call(db.one("get_readiness"))
    assert service.call(prune) == 0
    assert service.call(db.one("get_stats")).keys() >= {"counts", "breakers"}, "it counts all there is"
