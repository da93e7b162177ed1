"""Unsubscribing: one click, no sign-in, and looking at the page changes nothing."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, app, user_token
from peers import Mailbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
EMAIL_ON = "SELECT email_enabled FROM notification_preferences WHERE user_id = 'alice'"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture
def link(reach: Any, post: Post, mailbox: Mailbox, drain: Callable[[], None]) -> str:
    """The address in the header of a mail to Alice about invoice.due."""
    reach("alice", email="alice@example.org", email_enabled=True)
    post(severity="warning", event_name="invoice.due")
    drain()
    return str(mailbox.messages[0].message["List-Unsubscribe"]).strip("<>")


def test_the_header_names_what_one_click_needs(link: str, mailbox: Mailbox, service: Running) -> None:
    assert link.startswith(f"{service.url}/unsubscribe/")
    letter = mailbox.messages[0]
    assert letter.message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert link in letter.text and link in letter.html


def test_a_mail_programs_click_ends_all_mail_and_may_come_twice(
    link: str, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    for _ in range(2):
        reply = httpx.post(link, data={"List-Unsubscribe": "One-Click"})
        assert reply.status_code == 200
        assert sql(EMAIL_ON) == [(False,)]
    post(severity="critical")
    drain()
    assert len(mailbox.messages) == 1
    assert sql("SELECT count(*) FROM suppressions") == [(1,)]


@pytest.mark.parametrize("form", [{"List-Unsubscribe": "One-Click"}, {"event": "invoice.due"}])
def test_an_old_link_stores_nothing_about_who_was_erased(
    link: str, api: httpx.Client, contents: Callable[[], Any], form: dict[str, str]
) -> None:
    assert api.delete("/api/users/alice").status_code == 204
    before = contents()
    assert httpx.post(link, data=form).status_code == 200
    assert contents() == before


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_looking_changes_nothing(link: str, contents: Callable[[], Any], method: str) -> None:
    before = contents()
    reply = httpx.request(method, link)
    assert reply.status_code == 200
    assert contents() == before


def test_the_page_has_a_form_for_all_and_one_for_just_this_event(link: str) -> None:
    page = httpx.get(link).text
    assert page.count("<form") >= 1 and page.count("<button") >= 2
    assert (
        "invoice.due" in page
        and "<script" not in page.partition("</head>")[2].partition("<form")[2].partition("</form>")[0]
    )


def test_just_this_event_leaves_the_others_on(
    link: str, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], alice: httpx.Client
) -> None:
    for _ in range(2):
        assert httpx.post(link, data={"event": "1"}).status_code == 200
    assert sql(EMAIL_ON) == [(True,)]
    assert alice.get("/api/preferences").json()["preferences"]["events"] == {"invoice.due": {"email": False}}
    post(severity="critical", event_name="invoice.due")
    post(severity="warning", event_name="other", title="Other")
    drain()
    assert [letter.subject for letter in mailbox.messages[1:]] == ["Other"]


def test_a_link_of_a_digest_names_no_event_and_ends_all_mail(
    reach: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    for name in ("a", "b"):
        post(severity="warning", event_name=name, batch_key="k")
    sql("UPDATE outbox SET available_at = now()")
    drain()
    link = str(mailbox.messages[0].message["List-Unsubscribe"]).strip("<>")
    assert httpx.get(link).status_code == 200
    assert httpx.post(link, data={"event": "1"}).status_code == 200
    assert sql(EMAIL_ON) == [(False,)]


def test_only_the_user_may_ask_for_mail_again(
    link: str,
    post: Post,
    mailbox: Mailbox,
    api: httpx.Client,
    alice: httpx.Client,
    sql: Sql,
    drain: Callable[[], None],
) -> None:
    httpx.post(link, data={"List-Unsubscribe": "One-Click"})
    api.patch("/api/users/alice/preferences", json={"email_enabled": True})
    post(severity="warning")
    drain()
    assert len(mailbox.messages) == 1
    assert sql("SELECT reason FROM deliveries WHERE status = 'suppressed'") == [("unsubscribed",)]
    alice.patch("/api/preferences", json={"email_enabled": True})
    post(severity="warning")
    drain()
    assert len(mailbox.messages) == 2


def test_a_link_that_was_not_signed_here_changes_nothing(
    link: str, service: Running, contents: Callable[[], Any]
) -> None:
    good = link.rpartition("/")[2]
    key = app.derive("another secret of more than 32 bytes", "unsubscribe")
    foreign = app.jwt.encode({"sub": "alice", "event": None}, key, "HS256")
    flipped = good.replace(good[30], "A" if good[30] != "A" else "B")
    before = contents()
    for token in (good[:-3], flipped, foreign, user_token("alice"), "x"):
        url = f"{service.url}/unsubscribe/{token}"
        assert httpx.post(url, data={"List-Unsubscribe": "One-Click"}).status_code == 404
        assert httpx.get(url).status_code == 404
    assert contents() == before


def test_the_longest_link_works_and_a_longer_path_leads_nowhere(service: Running) -> None:
    claims = {"sub": "\N{OWL}" * 200, "event": "\N{OWL}" * 120}
    token = app.jwt.encode(claims, app.derive(service.service.settings.secret, "unsubscribe"), "HS256")
    assert "\N{OWL}" * 120 in httpx.get(f"{service.url}/unsubscribe/{token}").text
    assert httpx.get(f"{service.url}/unsubscribe/{'x' * app.PATH_LENGTH}").status_code == 404


def test_a_link_is_worthless_anywhere_else(link: str, service: Running) -> None:
    token = link.rpartition("/")[2]
    assert (
        httpx.get(
            f"{service.url}/api/notifications", headers={"Authorization": f"Bearer {token}"}
        ).status_code
        == 401
    )
