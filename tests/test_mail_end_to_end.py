"""E-mail from the post to the mailbox; what a single mail looks like is told in test_email."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, eventually
from peers import Mailbox, running

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture(autouse=True)
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def test_a_warning_is_a_mail_a_moment_later(
    post: Post, mailbox: Mailbox, drain: Callable[[], None], sql: Sql, alice: httpx.Client, service: Running
) -> None:
    stored = post(severity="warning", title="Disk full")
    drain()
    [letter] = mailbox.messages
    assert (letter.sender, letter.recipients) == ("bell@example.org", ["alice@example.org"])
    assert letter.subject == "Disk full" and f"{service.url}/n/{stored['id']}" in letter.text
    [(message,)] = sql("SELECT id FROM outbox")
    assert letter.message["Message-ID"] == f"<{message}@example.org>"
    [delivery] = alice.get(f"/api/notifications/{stored['id']}").json()["deliveries"]
    assert delivery.keys() >= {
        "channel",
        "target",
        "status",
        "reason",
        "attempts",
        "available_at",
        "sent_at",
        "last_error",
    }
    assert (delivery["channel"], delivery["target"], delivery["status"]) == ("email", None, "sent")


def test_it_leaves_without_waiting_for_the_poll(
    delivering: Any, api: httpx.Client, mailbox: Mailbox, service: Running
) -> None:
    with service.paused():
        lazy = delivering(poll_seconds=30)
        body = {"user_id": "alice", "event_name": "e", "title": "t", "body": "", "severity": "warning"}
        time.sleep(0.2)
        started = time.monotonic()
        assert httpx.post(f"{lazy.url}/api/notifications", json=body, headers=api.headers).status_code == 201
        mailbox.wait(1)
        assert time.monotonic() - started < 2


def test_what_a_user_did_not_ask_for_is_recorded_with_its_reason(
    post: Post, alice: httpx.Client, api: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    ids = {"below_severity": post(severity="success")["id"]}
    alice.patch("/api/preferences", json={"events": {"muted": {"email": False}}})
    ids["preference_off"] = post(severity="critical", event_name="muted")["id"]
    api.put("/api/users/alice", json={"email": None})
    ids["no_address"] = post(severity="critical")["id"]
    drain()
    assert (
        dict(sql("SELECT reason, notification_id::text FROM deliveries WHERE status = 'suppressed'")) == ids
    )
    assert not mailbox.messages


def test_connections_are_reused(post: Post, mailbox: Mailbox, drain: Callable[[], None]) -> None:
    for _ in range(10):
        post(severity="warning")
        drain()
    assert len(mailbox.messages) == 10 and mailbox.connections == 1


def test_a_server_that_hung_up_meanwhile_costs_no_attempt(
    post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    post(severity="warning")
    drain()
    mailbox.down()
    mailbox.up()
    post(severity="warning")
    drain()
    assert len(mailbox.messages) == 2
    assert sql("SELECT sum(attempts) FROM outbox") == [(0,)]


def test_a_private_or_secret_text_never_leaves(
    post: Post, mailbox: Mailbox, alice: httpx.Client, drain: Callable[[], None]
) -> None:
    private = post(severity="warning", title="Your diagnosis", private=True)
    secret = post(severity="warning", title="Key AKIAIOSFODNN7EXAMPLE leaked")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["You have a new notification"] * 2
    assert b"diagnosis" not in mailbox.messages[0].raw and b"AKIA" not in b"".join(
        m.raw for m in mailbox.messages
    )
    redacted = [
        alice.get(f"/api/notifications/{one['id']}").json()["deliveries"][0]["redacted"]
        for one in (private, secret)
    ]
    assert redacted == [False, True]


def test_mails_speak_the_users_language(
    post: Post, api: httpx.Client, mailbox: Mailbox, drain: Callable[[], None]
) -> None:
    api.put("/api/users/alice", json={"locale": "de-AT"})
    post(severity="warning", private=True)
    drain()
    assert mailbox.messages[0].subject != "You have a new notification"


def test_starttls_that_is_required_and_not_offered_is_a_fault_not_a_leak(
    delivering: Any, post: Post, mailbox: Mailbox, sql: Sql, service: Running
) -> None:
    with service.paused():
        delivering(smtp_url=f"{mailbox.url}?starttls=required")
        post(severity="warning")
        eventually(lambda: sql("SELECT 1 FROM breakers WHERE faults = 1"))
    assert not mailbox.messages


def test_a_wrong_password_is_the_providers_fault(
    delivering: Any, post: Post, sql: Sql, service: Running
) -> None:
    with service.paused(), running(Mailbox("implicit", ("bell", "right"))) as locked:
        careful = delivering(smtp_url=f"smtps://bell:wrong@127.0.0.1:{locked.port}")
        careful.service.outbound.tls.load_verify_locations(cadata=locked.certificate.decode())
        post(severity="warning")
        eventually(lambda: sql("SELECT 1 FROM breakers WHERE faults = 1"))
        assert "535" in sql("SELECT last_error FROM outbox")[0][0]
        assert not locked.messages


def test_a_server_that_trickles_is_cut_off_at_the_channel_timeout(
    delivering: Any, post: Post, sql: Sql, service: Running
) -> None:
    """A line of greeting that never ends: each byte comes in time, the whole does not."""
    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        caller, _ = listener.accept()
        with caller, contextlib.suppress(OSError):
            while True:
                caller.sendall(b"2")
                time.sleep(0.05)

    thread = threading.Thread(target=trickle)
    thread.start()
    with service.paused():
        delivering(smtp_url=f"smtp://127.0.0.1:{listener.getsockname()[1]}", channel_timeout_seconds=1)
        started = time.monotonic()
        post(severity="warning")
        eventually(lambda: sql("SELECT 1 FROM outbox WHERE state = 'pending' AND attempts = 1"))
        assert time.monotonic() - started < 3
    thread.join(5)
    listener.close()
