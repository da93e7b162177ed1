"""A channel that closes says so in the inbox: nobody finds out by missing messages."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, app, eventually
from peers import Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
NOTICES = "SELECT user_id, title, target_url, severity FROM notifications WHERE event_name = 'bellhop.channel_disabled'"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(admins="root,alice", webhook_per_minute=0)


@pytest.fixture
def mail_to_alice(reach: Callable[..., None]) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)


def test_an_endpoint_that_answers_410_is_switched_off_and_every_admin_is_told(
    api: httpx.Client, post: Post, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    id = api.post("/api/webhooks", json={"url": f"{hookbox.url}/gone"}).json()["webhook"]["id"]
    api.post("/api/webhooks", json={"url": f"{hookbox.url}/here"})
    hookbox.always("/gone", 410)
    first = post(severity="warning", user_id="bob")
    drain()
    eventually(lambda: len(sql(NOTICES)) == 2)
    drain()
    assert sorted(sql(NOTICES)) == [
        (user, "A webhook was switched off", "/admin", "warning") for user in ("alice", "root")
    ]
    bodies = sql("SELECT body FROM notifications WHERE event_name = 'bellhop.channel_disabled'")
    assert all(f"{hookbox.url}/gone" in body for (body,) in bodies)
    shown = {one["id"]: one["enabled"] for one in api.get("/api/webhooks").json()["webhooks"]}
    assert shown[id] is False and list(shown.values()).count(True) == 1
    ends = sql(
        "SELECT status, count(*) FROM deliveries WHERE notification_id = %s GROUP BY 1 ORDER BY 1",
        first["id"],
    )
    assert ends == [("failed", 1), ("sent", 1)]
    assert sum(hit.path == "/gone" for hit in hookbox.requests) == 1, "not even about its own end"


def test_many_at_once_that_find_an_endpoint_gone_tell_it_once(
    service: Running, api: httpx.Client, post: Post, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    api.post("/api/webhooks", json={"url": hookbox.url})
    hookbox.always("/", 410)
    with service.paused():
        for _ in range(20):
            post(severity="warning", user_id="bob")
    drain()
    eventually(lambda: len(sql(NOTICES)) == 2)
    drain()
    assert len(sql(NOTICES)) == 2
    assert sql("SELECT DISTINCT status FROM deliveries") == [("failed",)]


def test_a_browser_that_left_is_told_to_its_user(
    reach: Any, alice: httpx.Client, post: Post, pushbox: Pushbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", push_enabled=True)
    alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    pushbox.always("/push/1", 410)
    post(severity="warning")
    drain()
    eventually(lambda: sql(NOTICES))
    drain()
    assert sql(NOTICES) == [("alice", "A browser no longer receives alerts", "/preferences", "warning")]


def test_a_mail_address_is_dead_at_its_second_bounce_and_nothing_is_sent_there_again(
    mail_to_alice: None, post: Post, mailbox: Mailbox, api: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    mailbox.always("RCPT", "550 5.1.1 unknown")
    post(severity="warning")
    drain()
    assert sql(NOTICES) == []
    post(severity="warning")
    drain()
    eventually(lambda: sql(NOTICES))
    drain()
    assert sql(NOTICES) == [("alice", "E-mail to you was switched off", "/preferences", "warning")]
    mailbox.always("RCPT")
    post(severity="critical")
    drain()
    assert not mailbox.messages
    ends = sql("SELECT status, reason, count(*) FROM deliveries GROUP BY 1, 2 ORDER BY 1")
    assert ends == [("failed", None, 2), ("suppressed", "no_address", 2)]
    api.put("/api/users/alice", json={"email": "alice@new.example.org"})
    post(severity="warning", title="Welcome back")
    drain()
    assert [letter.recipients for letter in mailbox.messages] == [["alice@new.example.org"]]


def test_what_waits_for_an_address_that_died_meanwhile_is_not_sent(
    service: Running, mail_to_alice: None, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    mailbox.script("RCPT", *["550 5.1.1 unknown"] * 2)
    for key in ("k", "k", "k", None, None):
        post(severity="warning", batch_key=key)
    eventually(lambda: sql("SELECT 1 FROM suppressions WHERE hits = 2"))
    sql("UPDATE outbox SET available_at = now() WHERE state = 'open'")
    drain()
    assert not mailbox.messages
    assert ("suppressed", "no_address", 3) in sql(
        "SELECT d.status, d.reason, count(*) FROM deliveries d JOIN outbox o ON o.id = d.message_id GROUP BY 1, 2"
    )


@pytest.mark.parametrize("at_once", [1, 4])
def test_an_address_that_dies_while_many_are_under_way_is_told_once(
    service: Running, mail_to_alice: None, post: Post, sql: Sql, drain: Callable[[], None], at_once: int
) -> None:
    """Four results, written down one by one or all in one statement."""
    given = {"room": 4, "share": 4, "busy": "{}", "mail": True}
    db = service.service.worker.db
    with service.paused():
        for _ in range(4):
            post(severity="warning")
        claimed = service.call(db.many("claim_messages", app.outgoing, **given))
        keys = [{name: getattr(one, name) for name in ("user_id", "id", "claim_seq")} for one in claimed]
        results = [key | {"email": "alice@example.org", "verdict": "bounced", "error": "550"} for key in keys]
        for start in range(0, 4, at_once):
            part = app.encode(results[start : start + at_once])
            assert service.call(db.one("finish_messages", results=part))["times"] == at_once
    eventually(lambda: sql(NOTICES))
    drain()
    assert len(sql(NOTICES)) == 1
    assert sql("SELECT hits FROM suppressions") == [(4,)]


def test_a_mail_that_arrives_between_two_bounces_proves_the_address_alive(
    mail_to_alice: None, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    for answer in ("550 5.1.1 unknown", None, "550 5.1.1 unknown", None):
        mailbox.always("RCPT", answer)
        post(severity="warning")
        drain()
    assert len(mailbox.messages) == 2
    assert sql(NOTICES) == []


@pytest.mark.parametrize(
    ("place", "answer"), [("DATA", "554 5.7.1 spam"), ("MAIL", "550 5.7.1 no"), ("RCPT", "450 full")]
)
def test_other_refusals_say_nothing_about_the_address(
    mail_to_alice: None,
    post: Post,
    mailbox: Mailbox,
    sql: Sql,
    drain: Callable[[], None],
    place: str,
    answer: str,
) -> None:
    mailbox.always(place, answer)
    for _ in range(3):
        post(severity="warning")
        drain()
    assert sql("SELECT 1 FROM suppressions") == sql(NOTICES) == []


def test_a_user_who_asks_for_mail_again_gets_it(
    mail_to_alice: None,
    post: Post,
    mailbox: Mailbox,
    alice: httpx.Client,
    sql: Sql,
    drain: Callable[[], None],
) -> None:
    """The mailbox was full, now it is not: switching e-mail on again in the preferences is enough."""
    mailbox.script("RCPT", *["550 5.2.2 full"] * 2)
    for _ in range(2):
        post(severity="warning")
        drain()
    eventually(lambda: sql(NOTICES))
    alice.patch("/api/preferences", json={"email_enabled": True})
    post(severity="warning", title="Here again")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["Here again"]


@pytest.mark.parametrize(
    ("locale", "language"), [("de-CH", "de"), ("DE", "de"), ("fr_FR", "fr"), ("deu", "en"), ("koi-KR", "en")]
)
def test_the_notice_speaks_the_readers_language(
    reach: Any, alice: httpx.Client, post: Post, pushbox: Pushbox, sql: Sql, locale: str, language: str
) -> None:
    reach("alice", push_enabled=True, locale=locale)
    alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    pushbox.always("/push/1", 404)
    post(severity="warning")
    eventually(lambda: sql(NOTICES))
    assert sql(NOTICES)[0][1] == app.WORDS[language]["notice.push_title"]
