"""What can be watched from outside: counters, gauges and whether everything runs."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, app, eventually, problem
from peers import Mailbox
from prometheus_client.parser import text_string_to_metric_families

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture
def metrics(service: Running) -> Callable[..., float]:
    """The value of one sample now; 0 when there is none."""

    def read(name: str, **labels: str) -> float:
        reply = httpx.get(f"{service.url}/metrics")
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(reply.text)
        samples = [sample for family in families for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    return read


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def test_requests_are_counted_by_route_and_status(
    metrics: Any, service: Running, alice: httpx.Client
) -> None:
    route = {"route": "/api/notifications/{id}", "status": "404"}
    before = (
        metrics("bellhop_requests_total", **route),
        metrics("bellhop_requests_total", route="", status="404"),
    )
    for number in range(3):
        alice.get(f"/api/notifications/00000000-0000-4000-8000-00000000000{number}")
        alice.get(f"/nowhere/{number}")
    after = (
        metrics("bellhop_requests_total", **route),
        metrics("bellhop_requests_total", route="", status="404"),
    )
    assert [new - old for new, old in zip(after, before, strict=True)] == [3, 3]
    text = httpx.get(f"{service.url}/metrics").text
    assert "00000000-0000-4000" not in text and "nowhere" not in text, (
        "a label a route, not a label an address"
    )


def test_group_commit_and_attempts_are_counted(
    metrics: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    created = metrics("bellhop_create_batch_sum")
    sent = {"channel": "email", "state": "sent", "verdict": "sent"}
    failed = {"channel": "email", "state": "failed", "verdict": "dead"}
    before = [metrics("bellhop_messages_total", **labels) for labels in (sent, failed)]
    post(severity="warning")
    drain()
    mailbox.script("DATA", "554 no")
    post(severity="warning")
    drain()
    assert metrics("bellhop_create_batch_sum") - created == 2
    after = [metrics("bellhop_messages_total", **labels) for labels in (sent, failed)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1]


def test_deliveries_are_told_by_channel_status_and_reason(
    metrics: Any, post: Post, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    post(severity="warning")
    post(severity="info")
    post(severity="warning", batch_key="k")
    drain()

    def counts() -> list[float]:
        told = [
            ("sent", ""),
            ("suppressed", "below_severity"),
            ("queued", ""),
            ("suppressed", "already_read"),
        ]
        return [metrics("bellhop_deliveries", channel="email", status=s, reason=r) for s, r in told]

    assert counts() == [1, 1, 1, 0]
    alice.patch("/api/notifications", json={"all": True})
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert counts() == [1, 1, 0, 1], "what is no longer there is no longer told"


def test_the_age_of_the_oldest_due_message_tells_that_nothing_leaves(
    service: Running, metrics: Any, post: Post, sql: Sql, drain: Callable[[], None]
) -> None:
    with service.paused():
        post(severity="warning")
        sql("UPDATE outbox SET available_at = now() - interval '5 minutes'")
        assert 300 <= metrics("bellhop_oldest_due_seconds") < 310
    drain()
    assert metrics("bellhop_oldest_due_seconds") == 0


def test_breakers_leases_and_connections_are_told(metrics: Any, sql: Sql) -> None:
    assert metrics("bellhop_breaker_open") == 0
    sql("INSERT INTO breakers VALUES ('email', 10, now() + interval '20 seconds')")
    assert metrics("bellhop_breaker_open", provider="email") == 1
    sql("UPDATE breakers SET paused_until = now() - interval '2 minutes'")
    assert metrics("bellhop_breaker_open", provider="email") == 0, "nobody waits, so nobody probes"
    sql("DELETE FROM breakers")
    assert metrics("bellhop_breaker_open") == 0
    assert metrics("bellhop_leases_lost_total") >= 0
    assert metrics("bellhop_pool", what="pool_size") >= 2


def test_ready_names_the_loop_that_does_not_run(
    service: Running, sql: Sql, monkeypatch: pytest.MonkeyPatch, post: Post, mailbox: Mailbox
) -> None:
    assert httpx.get(f"{service.url}/health/ready").json() == {"status": "ok"}

    async def broken(*_: Any) -> None:
        raise RuntimeError

    loops = service.service.loops
    assert loops.tasks.keys() >= {"create", "intake", "prune", "claim", "finish"}
    monkeypatch.setattr(service.service.worker, "claim", broken)
    reply = eventually(lambda: (r := httpx.get(f"{service.url}/health/ready")).status_code == 503 and r)
    assert "claim" in problem(reply, 503)["detail"]
    assert httpx.get(f"{service.url}/health/live").status_code == 200
    monkeypatch.undo()
    eventually(lambda: httpx.get(f"{service.url}/health/ready").status_code == 200)
    post(severity="warning")
    mailbox.wait(1)


def test_a_process_that_delivers_nothing_has_no_such_loops_and_is_ready(delivering: Any) -> None:
    quiet = delivering(delivery_concurrency=0)
    assert not {"claim", "finish"} & quiet.service.loops.tasks.keys()
    assert httpx.get(f"{quiet.url}/health/ready").status_code == 200
    assert app.METRICS is not None
