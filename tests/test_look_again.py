"""At the moment of sending each item is looked at again: what is no longer wanted stays in, with its reason."""

from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from conftest import Running, eventually
from peers import Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
Change = Callable[[httpx.Client, httpx.Client, str], Any]

BY_ALICE: dict[str, tuple[Change, dict[str, str | None]]] = {
    "read": (
        lambda alice, api, id: alice.patch("/api/notifications", json={"notification_id": id}),
        dict.fromkeys(["email", "push", "webhook"], "already_read"),
    ),
    "archived": (
        lambda alice, api, id: alice.patch(f"/api/notifications/{id}", json={"archived": True}),
        dict.fromkeys(["email", "push", "webhook"], "already_read"),
    ),
    "resolved": (
        lambda alice, api, id: api.post("/api/resolve", json={"subject_key": "invoice:42"}),
        dict.fromkeys(["email", "push", "webhook"], "already_read"),
    ),
    "e-mail off": (
        lambda alice, api, id: alice.patch("/api/preferences", json={"email_enabled": False}),
        {"email": "preference_off", "push": None, "webhook": None},
    ),
    "push off": (
        lambda alice, api, id: alice.patch("/api/preferences", json={"push_enabled": False}),
        {"email": None, "push": "preference_off", "webhook": None},
    ),
    "event off": (
        lambda alice, api, id: alice.patch(
            "/api/preferences",
            json={"events": {"invoice.*": {"email": False, "webhook": False, "push": False}, "invoice.due": {"push": True}}},
        ),
        {"email": "preference_off", "push": None, "webhook": "preference_off"},
    ),
    "address removed": (
        lambda alice, api, id: api.put("/api/users/alice", json={"email": None}),
        {"email": "no_address", "push": None, "webhook": None},
    ),
    "read and unread again": (
        lambda alice, api, id: [alice.patch(f"/api/notifications/{id}", json={"read": read}) for read in (True, False)],
        {"email": None, "push": None, "webhook": None},
    ),
}  # fmt: skip


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture
def everywhere(
    reach: Any, alice: httpx.Client, api: httpx.Client, pushbox: Pushbox, hookbox: Hookbox
) -> Callable[[], dict[str, int]]:
    """Alice is reached on all channels; gives what each has received."""
    reach("alice", email="alice@example.org", email_enabled=True, push_enabled=True)
    alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    api.post("/api/webhooks", json={"url": hookbox.url, "user_id": "alice"})
    return lambda: {"push": len(pushbox.messages), "webhook": len(hookbox.requests)}


@pytest.mark.parametrize("change", BY_ALICE)
def test_what_changed_meanwhile_decides(
    service: Running, everywhere: Any, post: Post, alice: httpx.Client, api: httpx.Client, mailbox: Mailbox,
    drain: Callable[[], None], change: str,
) -> None:  # fmt: skip
    act, expected = BY_ALICE[change]
    with service.paused():
        id = post(event_name="invoice.due", severity="warning", subject_key="invoice:42")["id"]
        act(alice, api, id)
    drain()
    told = alice.get(f"/api/notifications/{id}").json()["deliveries"]
    assert {one["channel"]: one["reason"] for one in told} == expected
    assert {one["channel"]: one["status"] for one in told} == {
        channel: "suppressed" if reason else "sent" for channel, reason in expected.items()
    }
    received = everywhere() | {"email": len(mailbox.messages)}
    assert received == {channel: int(reason is None) for channel, reason in expected.items()}


def test_the_unsubscribed_get_nothing_not_even_what_was_critical(
    service: Running, reach: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    post(severity="warning")
    drain()
    [link] = [line for line in mailbox.messages[0].text.split() if "/unsubscribe/" in line]
    with service.paused():
        post(severity="critical")
        assert httpx.post(link, data={"List-Unsubscribe": "One-Click"}).status_code == 200
    drain()
    assert len(mailbox.messages) == 1
    assert sql("SELECT status, reason FROM deliveries WHERE status <> 'sent'") == [
        ("suppressed", "unsubscribed")
    ]


def test_only_what_is_left_is_sent_and_each_part_keeps_its_own_end(
    service: Running, reach: Any, post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Any
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    read, muted, skipped_over, left = (
        post(severity="warning", batch_key="k", event_name=name)["id"] for name in ("a", "muted", "b", "c")
    )
    alice.patch("/api/notifications", json={"notification_id": read})
    alice.patch("/api/preferences", json={"events": {"muted": {"email": False}}})
    alice.patch(f"/api/notifications/{skipped_over}", json={"archived": True})
    sql("UPDATE outbox SET available_at = now()")
    drain()
    rows = dict(sql("SELECT notification_id::text, coalesce(reason, status) FROM deliveries"))
    assert rows == {read: "already_read", muted: "preference_off", skipped_over: "already_read", left: "sent"}
    assert left in mailbox.messages[0].text and read not in mailbox.messages[0].text


def test_a_look_is_taken_before_every_attempt(
    reach: Any, post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    mailbox.script("MAIL", "451 4.3.0 later")
    post(severity="warning")
    drain()
    assert alice.patch("/api/notifications", json={"all": True}).status_code == 200
    sql("UPDATE outbox SET available_at = now()")
    drain()
    assert sql("SELECT status, reason FROM deliveries") == [("suppressed", "already_read")]
    assert sql("SELECT state, attempts FROM outbox") == [("void", 1)]
    assert not mailbox.messages


def test_a_subscription_or_endpoint_that_is_gone_fails_its_deliveries(
    service: Running, everywhere: Any, alice: httpx.Client, api: httpx.Client, post: Post, pushbox: Pushbox, sql: Sql,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    with service.paused():
        post(severity="warning")
        [endpoint] = sql("SELECT endpoint FROM push_subscriptions")
        assert (
            alice.request("DELETE", "/api/push/subscriptions", json={"endpoint": endpoint[0]}).status_code
            == 204
        )
        [(webhook,)] = sql("SELECT id FROM webhook_endpoints")
        assert api.delete(f"/api/webhooks/{webhook}").status_code == 204
    drain()
    rows = sql("SELECT channel, status, last_error FROM deliveries WHERE channel <> 'email' ORDER BY 1")
    gone = "its endpoint or subscription is gone"
    assert rows == [("push", "failed", gone), ("webhook", "failed", gone)]
    assert everywhere() == {"push": 0, "webhook": 0}


def test_without_a_mail_server_the_channel_is_off_and_nothing_waits_for_ever(
    serve: Callable[..., Running], client: Any, make_key: Any, sql: Sql, drain: Callable[[], None]
) -> None:
    service = serve(poll_seconds=0.05)
    api = client(service.url, make_key("admin"))
    api.put("/api/users/carol", json={"email": "carol@example.org"})
    api.patch("/api/users/carol/preferences", json={"email_enabled": True})
    body = {"user_id": "carol", "event_name": "e", "title": "t", "body": "", "severity": "critical"}
    api.post("/api/notifications", json=body)
    drain()
    assert sql("SELECT status, reason, last_error FROM deliveries") == [
        ("suppressed", "preference_off", None)
    ]


def test_an_erased_user_gets_nothing(
    service: Running, everywhere: Any, post: Post, api: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Any
) -> None:
    with service.paused():
        post(severity="critical")
        assert api.delete("/api/users/alice").status_code == 204
    drain()
    assert not mailbox.messages and everywhere() == {"push": 0, "webhook": 0}
    assert sql("SELECT 1 FROM outbox UNION ALL SELECT 1 FROM deliveries") == []


def test_what_needs_no_sending_holds_up_nobody(
    service: Running, reach: Any, post: Post, alice: httpx.Client, mailbox: Mailbox, sql: Sql
) -> None:
    """Forty that were read meanwhile take ten claims, and the next look by the clock is far away."""
    reach("alice", email="alice@example.org", email_enabled=True)
    worker = service.service.worker
    with service.paused():
        for _ in range(40):
            post(severity="warning")
        assert alice.patch("/api/notifications", json={"all": True}).json()["updated"] == 40
        post(severity="warning", title="still new")
        worker.settings = msgspec.structs.replace(worker.settings, poll_seconds=60)
    assert mailbox.wait(1)[0].subject == "still new"
    assert eventually(lambda: sql("SELECT state, count(*) FROM outbox GROUP BY 1 ORDER BY 1")[-1]) == (
        "void",
        40,
    )
