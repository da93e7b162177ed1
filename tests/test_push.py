"""Web Push from the browser's registration to what it shows."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, problem, user_token
from peers import Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture(autouse=True)
def push_on(reach: Callable[..., None]) -> None:
    reach("alice", push_enabled=True)
    reach("bob", push_enabled=True)


def register(user: httpx.Client, pushbox: Pushbox) -> str:
    reply = user.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    assert reply.status_code == 201, reply.text
    return reply.json()["id"]


def test_a_warning_reaches_every_browser_of_its_user_encrypted_and_signed(
    alice: httpx.Client,
    bob: httpx.Client,
    post: Post,
    pushbox: Pushbox,
    drain: Callable[[], None],
    service: Running,
) -> None:
    targets = {register(alice, pushbox), register(alice, pushbox)}
    register(bob, pushbox)
    stored = post(severity="warning", title="Disk full")
    drain()
    assert not pushbox.faults
    assert pushbox.messages == [
        {
            "id": stored["id"], "title": "Disk full", "url": f"{service.url}/n/{stored['id']}", "tag": stored["id"],
            "severity": "warning",
        }
    ] * 2  # fmt: skip
    assert {hit.path for hit in pushbox.taken} == {"/push/1", "/push/2"}
    deliveries = alice.get(f"/api/notifications/{stored['id']}").json()["deliveries"]
    assert {one["target"] for one in deliveries} == targets
    assert {one["status"] for one in deliveries} == {"sent"}
    assert all(hit.headers["Urgency"] == "normal" and int(hit.headers["TTL"]) > 0 for hit in pushbox.taken)


def test_the_same_endpoint_again_is_the_same_subscription_with_its_new_keys(
    alice: httpx.Client, post: Post, pushbox: Pushbox, drain: Callable[[], None], sql: Sql
) -> None:
    first = pushbox.subscription()
    body = first.to_json()
    made = alice.post("/api/push/subscriptions", json=body)
    stale = body | {"keys": pushbox.subscription().keys}
    assert alice.post("/api/push/subscriptions", json=stale).status_code == 200
    again = alice.post("/api/push/subscriptions", json=body)
    assert (made.status_code, again.status_code, made.json()) == (201, 200, again.json())
    post(severity="warning")
    drain()
    assert len(pushbox.messages) == 1 and not pushbox.faults
    assert sql("SELECT count(*) FROM push_subscriptions") == [(1,)]


def test_a_browser_belongs_to_whoever_registered_it_last(
    alice: httpx.Client, bob: httpx.Client, post: Post, pushbox: Pushbox, drain: Callable[[], None]
) -> None:
    """What was on its way to the reader before does not reach the new one."""
    subscription = pushbox.subscription().to_json()
    assert alice.post("/api/push/subscriptions", json=subscription).status_code == 201
    assert bob.post("/api/push/subscriptions", json=subscription).status_code == 201
    missed = post(severity="warning", title="for alice")
    post(severity="warning", title="for bob", user_id="bob")
    drain()
    assert [message["title"] for message in pushbox.messages] == ["for bob"]
    [delivery] = alice.get(f"/api/notifications/{missed['id']}").json()["deliveries"]
    assert (delivery["status"], delivery["reason"], delivery["target"]) == ("suppressed", "no_address", None)


def test_what_waits_for_a_browser_that_moved_on_fails(
    service: Running,
    alice: httpx.Client,
    bob: httpx.Client,
    post: Post,
    pushbox: Pushbox,
    sql: Sql,
    drain: Any,
) -> None:
    subscription = pushbox.subscription().to_json()
    alice.post("/api/push/subscriptions", json=subscription)
    with service.paused():
        post(severity="warning", title="for alice")
        bob.post("/api/push/subscriptions", json=subscription)
    drain()
    assert not pushbox.messages
    assert sql("SELECT status FROM deliveries") == [("failed",)]


def test_an_unregistered_browser_gets_nothing_and_unregistering_twice_is_no_fault(
    alice: httpx.Client, bob: httpx.Client, post: Post, pushbox: Pushbox, drain: Callable[[], None]
) -> None:
    subscription = pushbox.subscription()
    alice.post("/api/push/subscriptions", json=subscription.to_json())
    for who, left in ((bob, 1), (alice, 0), (alice, 0)):
        reply = who.request("DELETE", "/api/push/subscriptions", json={"endpoint": subscription.endpoint})
        assert (reply.status_code, reply.content) == (204, b"")
        pushbox.messages.clear()
        post(severity="warning")
        drain()
        assert len(pushbox.messages) == left


def test_a_plain_http_endpoint_is_refused_unless_addresses_are_allowed_by_name(
    serve: Callable[..., Running], client: Callable[..., httpx.Client], pushbox: Pushbox
) -> None:
    browser = pushbox.subscription().to_json() | {"endpoint": "http://push.example.org/1"}
    reader = client(serve().url, user_token("alice"))
    problem(reader.post("/api/push/subscriptions", json=browser), 400, "endpoint")
    reader = client(serve(outbound_allow="10.0.0.0/8").url, user_token("alice"))
    assert reader.post("/api/push/subscriptions", json=browser).status_code == 201


def test_the_key_that_browsers_subscribe_with_signs(
    alice: httpx.Client, post: Post, pushbox: Pushbox, drain: Callable[[], None]
) -> None:
    key = alice.get("/api/push/key").json()["public_key"]
    register(alice, pushbox)
    post(severity="warning")
    drain()
    assert f",k={key}" in pushbox.taken[0].headers["Authorization"]


def test_push_follows_rule_one(
    alice: httpx.Client, post: Post, pushbox: Pushbox, drain: Callable[[], None], sql: Sql
) -> None:
    register(alice, pushbox)
    alice.patch("/api/preferences", json={"events": {"muted.*": {"push": False}}})
    post(severity="info")
    post(severity="critical", event_name="muted.fire")
    drain()
    assert not pushbox.messages
    rows = sql("SELECT status, reason FROM deliveries ORDER BY 2")
    assert rows == [("suppressed", "below_severity"), ("suppressed", "preference_off")]


def test_a_batch_key_does_not_hold_a_push_back(
    alice: httpx.Client, post: Post, pushbox: Pushbox, drain: Callable[[], None]
) -> None:
    register(alice, pushbox)
    for _ in range(3):
        post(severity="warning", batch_key="k")
    drain()
    assert [message["title"] for message in pushbox.messages] == ["A comment"] * 3
