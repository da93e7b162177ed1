"""Nothing of a body or of data leaves the app, by any way in, any way out, or into the log.

Beyond this file every test's `post` carries the marker, and every peer and every log is searched for it.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from conftest import Running, app, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import DROP, MARKER, Hookbox, Mailbox, Pushbox, heard

Sql = Callable[..., list[tuple[Any, ...]]]
INSIDE = {"body": f"body {MARKER}", "data": {"key": MARKER, MARKER: [1]}}
NOTE = {
    "user_id": "alice",
    "event_name": "invoice.due",
    "title": "Invoice 42",
    "severity": "warning",
} | INSIDE
HEADERS = {
    "subject", "from", "to", "date", "message-id", "auto-submitted", "list-unsubscribe", "list-unsubscribe-post",
    "mime-version", "content-type", "x-peer", "x-mailfrom", "x-rcptto",
}  # fmt: skip


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(max_attempts=2, webhook_per_minute=0, push_per_minute=4)


@pytest.fixture
def everywhere(
    reach: Any, alice: httpx.Client, api: httpx.Client, pushbox: Pushbox, hookbox: Hookbox
) -> None:
    """Alice is reached on all channels."""
    reach("alice", email="alice@example.org", email_enabled=True, push_enabled=True)
    alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    api.post("/api/webhooks", json={"url": hookbox.url})


def test_no_way_in_and_no_way_out_tells_a_body_or_data(
    everywhere: None, api: httpx.Client, mailbox: Mailbox, pushbox: Pushbox, hookbox: Hookbox, sql: Sql, drain: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    mailbox.script("DATA", "451 4.3.0 later", DROP, "554 5.6.0 no")
    hookbox.script("/", 500, DROP)
    pushbox.script("/push/1", 500, DROP)
    one = {key: value for key, value in NOTE.items() if key != "user_id"}
    for number in range(6):
        api.post("/api/notifications", json=NOTE | {"batch_key": "k" if number % 2 else None})
    api.post("/api/notifications", json=one | {"user_ids": ["alice", "bob"], "summary": "In short"})
    api.post("/api/notifications/batch", json={"notifications": [NOTE | {"severity": "critical"}] * 3})
    api.post("/api/notifications", json=NOTE | {"deliver_at": datetime.now(UTC).isoformat(), "private": True})
    sql(
        "INSERT INTO intake (payload) VALUES (%s::jsonb), (%s::jsonb)",
        app.encode(NOTE),
        app.encode(NOTE | {"x": 1}),
    )
    eventually(lambda: sql("SELECT count(*) FROM intake WHERE error IS NULL") == [(0,)])
    for _ in range(3):
        sql("UPDATE outbox SET available_at = now() WHERE state IN ('open', 'pending')")
        drain()
    assert len(mailbox.messages) > 3 and len(hookbox.requests) > 9 and len(pushbox.messages) > 3
    assert any("notifications" in letter.subject for letter in mailbox.messages)
    for peer in (mailbox, hookbox, pushbox):
        assert MARKER not in heard(peer)
    assert MARKER not in caplog.text
    assert MARKER not in str(sql("SELECT error FROM intake WHERE error IS NOT NULL"))


def test_no_error_and_no_metric_repeats_what_was_sent(
    api: httpx.Client,
    service: Running,
    sql: Sql,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, logger="bellhop")
    bodies = [NOTE | {"severity": "loud"}, NOTE | {"title": None}, NOTE | {"user_id": ""}]
    replies = [api.post("/api/notifications", json=body) for body in bodies]
    replies.append(
        api.post(
            "/api/notifications", content=f'{{"body": "{MARKER}', headers={"Content-Type": "application/json"}
        )
    )
    sql("ALTER TABLE notifications ADD CONSTRAINT no_more CHECK (event_name <> 'trap')")
    replies.append(api.post("/api/notifications", json=NOTE | {"event_name": "trap"}))
    assert [reply.status_code for reply in replies] == [400, 400, 400, 400, 500]
    assert "failed" in caplog.text, "the 500 is in the log"
    for text in [reply.text for reply in replies] + [caplog.text, httpx.get(f"{service.url}/metrics").text]:
        assert MARKER not in text and "Invoice 42" not in text


def test_the_log_names_no_address_title_token_or_endpoint(
    everywhere: None, api: httpx.Client, alice: httpx.Client, mailbox: Mailbox, pushbox: Pushbox, hookbox: Hookbox,
    service: Running, sql: Sql, drain: Callable[[], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    for name in (
        "httpx",
        "httpcore",
        "asyncio",
        "mail.log",
        "psycopg",
        "psycopg.pool",
        "faker",
        "hypothesis",
    ):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)  # the test's own and its peers'

    def explode(self: Any, message: Any) -> bytes:
        raise LookupError(f"{message.address} {message.lines}")

    monkeypatch.setattr(app.Outbound, "compose", explode)
    mailbox.always("DATA", "554 alice@example.org is refused")
    hookbox.always("/", 500)
    pushbox.always("/push/1", DROP)
    api.post("/api/notifications", json=NOTE)
    drain()
    assert "LookupError" in caplog.text, "a mistake of ours is told, by its name"
    token = alice.headers["Authorization"].split()[1]
    for secret in ("alice@example.org", "Invoice 42", "/push/1", hookbox.url, token, "LookupError("):
        assert secret not in caplog.text


def test_no_text_of_any_field_adds_a_header_or_leaves_where_it_may_not(
    everywhere: None,
    api: httpx.Client,
    mailbox: Mailbox,
    sql: Sql,
    drain: Callable[[], None],
    service: Running,
) -> None:
    """Injection strings in every text field, through HTTP to a real mail server."""
    nasty = st.sampled_from(["\r\nBcc: eve@evil.example", "\nX-Evil: 1\n\n", "=?utf-8?q?=0ABcc:_eve=40evil.example?=",
                             "a\r\n.\r\nMAIL FROM:<eve@evil.example>", "\u2028Bcc: e@evil.example", "<script>x</script>"])  # fmt: skip
    text = st.lists(
        nasty | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
        max_size=6,
    )
    texts = text.map("".join).map(lambda value: value[:200])
    key = texts.filter(bool)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(key, texts, key.map(lambda value: value[:120]), key, texts)
    def check(title: str, body: str, event_name: str, batch_key: str, summary: str) -> None:
        note = {
            "user_id": "alice",
            "title": title,
            "body": body,
            "event_name": event_name,
            "severity": "critical",
        }
        reply = api.post("/api/notifications", json=note | {"batch_key": batch_key, "subject_key": batch_key,
                                                            "summary": summary})  # fmt: skip
        assert reply.status_code == 201, reply.text

    check()
    sql("UPDATE outbox SET critical = true, state = 'open', token_minute = now(), available_at = now()"
        " WHERE channel = 'email' AND state IN ('open', 'pending')")  # fmt: skip
    drain()
    failed = sql(
        "SELECT last_error FROM deliveries WHERE channel = 'email' AND status <> 'sent' AND reason IS NULL"
    )
    assert not failed
    assert len(mailbox.messages) >= 30
    for letter in mailbox.messages:
        names = [name.lower() for name, _ in letter.message.items()]
        assert set(names) <= HEADERS and len(names) == len(set(names))
        assert letter.recipients == ["alice@example.org"]
        assert letter.message["To"] == "alice@example.org"
