"""A user's messages still to leave: what waits, sending it now, never sending it."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import Running, problem

Json = dict[str, Any]
Sql = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def service(serve: Callable[..., Running]) -> Running:
    """A service that sends nothing, so that what waits can be looked at."""
    return serve(delivery_concurrency=0)


@pytest.fixture
def waiting(api: httpx.Client, alice: httpx.Client, post: Callable[..., Json]) -> list[Json]:
    """Two digests of Alice's, one with three items and one with one."""
    api.put("/api/users/alice", json={"email": "alice@example.com"})
    api.patch("/api/users/alice/preferences", json={"email_enabled": True, "min_severity": "info"})
    for number in range(3):
        post(batch_key="post:7", title=f"{number}")
    post(batch_key="post:8")
    return alice.get("/api/outbox").json()["outbox"]


def test_the_outbox_shows_what_waits_the_next_one_first(
    alice: httpx.Client, bob: httpx.Client, waiting: Any
) -> None:
    assert [(one["channel"], one["batch_key"], one["items"]) for one in waiting] == [
        ("email", "post:7", 3), ("email", "post:8", 1),
    ]  # fmt: skip
    for one in waiting:
        assert one.keys() == {"id", "channel", "batch_key", "items", "available_at", "status"}
        assert datetime.fromisoformat(one["available_at"]) > datetime.now(UTC)
    assert bob.get("/api/outbox").json() == {"outbox": []}


def test_a_message_can_leave_now(alice: httpx.Client, waiting: Any) -> None:
    assert alice.post(f"/api/outbox/{waiting[1]['id']}/send", json={}).status_code == 200
    now = alice.get("/api/outbox").json()["outbox"]
    assert [one["id"] for one in now] == [waiting[1]["id"], waiting[0]["id"]]
    assert datetime.fromisoformat(now[0]["available_at"]) <= datetime.now(UTC)


def test_a_message_can_be_kept_from_ever_leaving(
    alice: httpx.Client, waiting: Any, post: Callable[..., Json], sql: Sql
) -> None:
    assert alice.post(f"/api/outbox/{waiting[0]['id']}/skip").status_code == 200
    assert [one["id"] for one in alice.get("/api/outbox").json()["outbox"]] == [waiting[1]["id"]]
    for note in alice.get("/api/notifications").json()["notifications"]:
        (delivery,) = alice.get(f"/api/notifications/{note['id']}").json()["deliveries"]
        assert delivery["status"] == ("cancelled" if note["batch_key"] == "post:7" else "queued")
    assert alice.get("/api/unread-count").json() == {"unread_count": 4}, "in the app they stay"
    problem(alice.post(f"/api/outbox/{waiting[0]['id']}/skip"), 404)
    problem(alice.post(f"/api/outbox/{waiting[0]['id']}/send"), 404)
    post(batch_key="post:7")
    again = sorted(alice.get("/api/outbox").json()["outbox"], key=lambda one: one["batch_key"])
    assert [(one["batch_key"], one["items"]) for one in again] == [("post:7", 1), ("post:8", 1)]


def test_an_unknown_message_is_404(alice: httpx.Client, bob: httpx.Client, waiting: Any) -> None:
    for one, id in ((alice, str(uuid4())), (bob, waiting[0]["id"])):
        for what in ("send", "skip"):
            problem(one.post(f"/api/outbox/{id}/{what}"), 404)
    assert alice.get("/api/outbox").json()["outbox"] == waiting
