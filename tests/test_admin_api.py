"""The admin API: what failed and why, once more, all once more, and how it all fares."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, app, problem
from peers import Hookbox, Mailbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
NOBODY = "12345678-1234-4123-8123-123456789012"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(max_attempts=1, webhook_per_minute=0)


@pytest.fixture
def fail(
    api: httpx.Client, reach: Any, post: Post, mailbox: Mailbox, hookbox: Hookbox, drain: Any
) -> Callable[..., Any]:
    """Deliveries that failed, by mail and by webhook."""
    reach("alice", email="alice@example.org", email_enabled=True)

    def run(count: int, webhook: bool = False, **fields: Any) -> list[str]:
        if webhook:
            api.post("/api/webhooks", json={"url": hookbox.url})
        hookbox.always("/", 500)
        mailbox.always("DATA", "554 5.6.0 refused")
        ids = [post(severity="warning", **fields)["id"] for _ in range(count)]
        drain()
        hookbox.always("/")
        mailbox.always("DATA")
        return ids

    return run


def failed(api: httpx.Client, query: str = "") -> list[dict[str, Any]]:
    return api.get(f"/api/deliveries?status=failed{query}").json()["deliveries"]


def test_it_lists_what_failed_with_the_providers_words(fail: Any, api: httpx.Client) -> None:
    [id] = fail(1, webhook=True)
    shown = failed(api)
    assert {one["channel"]: one["last_error"] for one in shown} == {
        "email": "554 5.6.0 refused",
        "webhook": "500",
    }
    for one in shown:
        assert one.keys() >= {
            "id",
            "user_id",
            "notification_id",
            "channel",
            "target",
            "status",
            "attempts",
            "last_error",
        }
        assert (one["user_id"], one["notification_id"], one["attempts"]) == ("alice", id, 1)
    assert len(failed(api, "&channel=email")) == 1 and len(failed(api, "&user_id=alice")) == 2
    assert failed(api, "&user_id=bob") == failed(api, "&userId=bob") == failed(api, "&channel=push") == []
    assert api.get("/api/deliveries?status=sent").json()["deliveries"] == []
    problem(api.get("/api/deliveries?status=lost"), 400, "status")


def test_pages_hold_each_delivery_once(fail: Any, api: httpx.Client) -> None:
    fail(7)
    seen, cursor = [], ""
    while cursor is not None:
        page = api.get(f"/api/deliveries?limit=3{cursor and '&cursor=' + cursor}").json()
        assert len(page["deliveries"]) <= 3
        seen += [one["id"] for one in page["deliveries"]]
        cursor = page["next_cursor"]
    assert len(seen) == len(set(seen)) == 7
    assert seen == sorted(seen, reverse=True), "newest first"


def test_one_can_be_tried_again_with_a_fresh_budget(
    fail: Any, api: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    fail(2)
    first, _ = failed(api)
    assert api.post(f"/api/deliveries/{first['id']}/retry").status_code == 200
    drain()
    assert len(mailbox.messages) == 1
    assert sql("SELECT status, count(*) FROM deliveries GROUP BY 1 ORDER BY 1") == [
        ("failed", 1),
        ("sent", 1),
    ]
    assert sql("SELECT attempts, last_error FROM outbox WHERE state = 'sent'") == [(0, "554 5.6.0 refused")]
    problem(api.post(f"/api/deliveries/{first['id']}/retry"), 409)
    problem(api.post(f"/api/deliveries/{NOBODY}/retry"), 404)
    problem(api.post("/api/deliveries/x/retry"), 404)


def test_a_retried_digest_is_one_message_again(
    fail: Any, api: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    fail(3, batch_key="k")
    mailbox.always("DATA", "554 5.6.0 refused")
    sql("UPDATE outbox SET available_at = now()")
    drain()
    mailbox.always("DATA")
    api.post(f"/api/deliveries/{failed(api)[0]['id']}/retry")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["3 notifications"]
    assert sql("SELECT status, count(*) FROM deliveries GROUP BY 1") == [("sent", 3)]


def test_a_retry_looks_again(fail: Any, api: httpx.Client, alice: httpx.Client, sql: Sql, drain: Any) -> None:
    fail(1)
    alice.patch("/api/notifications", json={"all": True})
    api.post(f"/api/deliveries/{failed(api)[0]['id']}/retry")
    drain()
    assert sql("SELECT status, reason FROM deliveries") == [("suppressed", "already_read")]


def test_all_are_tried_again_when_no_body_names_a_channel(fail: Any, api: httpx.Client) -> None:
    fail(2)
    assert api.post("/api/deliveries/retry").json() == {"retried": 2}


def test_all_of_a_channel_or_all_can_be_tried_again_spread_out(
    fail: Any, api: httpx.Client, mailbox: Mailbox, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    fail(30, webhook=True)
    hookbox.requests.clear()
    assert api.post("/api/deliveries/retry", json={"channel": "webhook"}).json() == {"retried": 30}
    spread = sql("SELECT extract(epoch FROM max(available_at) - min(available_at))::float8 FROM outbox"
                 " WHERE channel = 'webhook'")  # fmt: skip
    assert spread[0][0] > 1
    sql("UPDATE outbox SET available_at = now() WHERE state = 'pending'")
    drain()
    assert len(hookbox.requests) == 30 and not mailbox.messages
    assert api.post("/api/deliveries/retry", json={}).json() == {"retried": 30}
    sql("UPDATE outbox SET available_at = now() WHERE state = 'pending'")
    drain()
    assert len(mailbox.messages) == 30
    assert api.post("/api/deliveries/retry", json={}).json() == {"retried": 0}
    problem(api.post("/api/deliveries/retry", json={"channel": "pigeon"}), 400, "channel")


def test_stats_count_by_channel_and_status_and_tell_how_late_the_oldest_is(
    fail: Any, api: httpx.Client, post: Post, sql: Sql, service: Running, drain: Callable[[], None]
) -> None:
    fail(2, webhook=True)
    post(severity="warning", user_id="bob")
    drain()
    stats = api.get("/api/stats").json()
    counts = {(one["channel"], one["status"]): one["n"] for one in stats["counts"]}
    assert counts == {("email", "failed"): 2, ("webhook", "failed"): 2, ("webhook", "sent"): 1}
    assert stats["oldest_due_seconds"] is None and stats["breakers"] == []
    with service.paused():
        post(severity="warning")
        sql("UPDATE outbox SET available_at = now() - interval '90 seconds' WHERE state = 'open'")
        assert 90 <= api.get("/api/stats").json()["oldest_due_seconds"] < 100
    drain()  # else its success would end the pause that is written here
    sql("INSERT INTO breakers VALUES ('email', 12, now() + interval '20 seconds')")
    [breaker] = api.get("/api/stats").json()["breakers"]
    assert (breaker["provider"], breaker["faults"]) == ("email", 12) and breaker["paused_until"]


def test_an_admin_sees_why_a_delivery_waits(
    fail: Any, api: httpx.Client, alice: httpx.Client, sign_in: Any, service: Running, sql: Sql
) -> None:
    """Also in the timeline of a notification of the admin's own; a user does not."""
    [id] = fail(1)
    sql(
        "UPDATE outbox SET state = 'pending', available_at = now() + interval '1 hour', last_error = '451 busy'"
    )
    sql("UPDATE deliveries SET status = 'queued', last_error = NULL")
    [waiting] = api.get("/api/deliveries?status=queued").json()["deliveries"]
    assert waiting["last_error"] == "451 busy"
    cookie = {app.COOKIE: sign_in("alice", admin=True)}
    [delivery] = httpx.get(f"{service.url}/api/notifications/{id}", cookies=cookie).json()["deliveries"]
    assert delivery["last_error"] == "451 busy"
    [delivery] = alice.get(f"/api/notifications/{id}").json()["deliveries"]
    assert delivery["last_error"] is None
