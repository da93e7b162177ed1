"""Webhooks: whom an endpoint hears of, what it gets, and that it can check who says so."""

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from conftest import Running, problem
from peers import Hit, Hookbox
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
ANYBODY = "12345678-1234-4123-8123-123456789012"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(webhook_per_minute=0)


@pytest.fixture
def add(api: httpx.Client, hookbox: Hookbox) -> Callable[..., dict[str, Any]]:
    """A new endpoint at a path of the hookbox, as the 201 shows it."""

    def make(path: str = "/", **fields: Any) -> dict[str, Any]:
        reply = api.post("/api/webhooks", json={"url": hookbox.url + path} | fields)
        assert reply.status_code == 201, reply.text
        return reply.json()

    return make


def verified(secret: str, hit: Hit) -> Any:
    return Webhook(secret).verify(hit.body, dict(hit.headers))


def paths(hookbox: Hookbox) -> list[str]:
    return sorted(hit.path for hit in hookbox.requests)


def test_an_event_is_told_in_the_standards_form_and_signed(
    add: Any, post: Post, hookbox: Hookbox, drain: Callable[[], None], service: Running
) -> None:
    secret = add()["secret"]
    assert secret.startswith("whsec_")
    stored = post(
        title="Disk full", body="the body", data={"inner": 1}, severity="warning", event_name="disk.full"
    )
    drain()
    [hit] = hookbox.requests
    told = verified(secret, hit)
    assert told["data"] == {
        "id": stored["id"], "user_id": "alice", "event_name": "disk.full", "severity": "warning",
        "summary": "Disk full", "url": f"{service.url}/n/{stored['id']}", "created_at": told["data"]["created_at"],
    }  # fmt: skip
    assert datetime.fromisoformat(told["data"]["created_at"]) == datetime.fromisoformat(stored["created_at"])
    assert told.keys() == {"type", "timestamp", "data"} and told["type"] == "notification.created"
    assert hit.method == "POST" and hit.headers["Content-Type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(hit.body + b" ", dict(hit.headers))


def test_an_empty_summary_is_none(post: Post, add: Any, hookbox: Hookbox, drain: Callable[[], None]) -> None:
    add()
    post(severity="warning", title="The title speaks", summary="")
    drain()
    assert b"The title speaks" in hookbox.requests[0].body


def test_an_endpoint_hears_of_what_its_events_severity_and_user_match(
    add: Any, post: Post, hookbox: Hookbox, drain: Callable[[], None]
) -> None:
    add("/all", min_severity="info")
    add("/default")
    add("/critical", min_severity="critical")
    add("/exact", events=["invoice.due"], min_severity="info")
    add("/prefix", events=["other", "invoice.*"], min_severity="info")
    add("/bob", user_id="bob", min_severity="info")
    add("/percent", events=["invoice.%", "_%", "inv*"], min_severity="info")
    post(event_name="invoice.due", severity="info")
    drain()
    assert paths(hookbox) == ["/all", "/exact", "/prefix"]
    hookbox.requests.clear()
    post(user_id="bob", event_name="invoiceXdue", severity="critical")
    drain()
    assert paths(hookbox) == ["/all", "/bob", "/critical", "/default"]


def test_a_user_may_keep_an_event_from_all_webhooks(
    add: Any, post: Post, hookbox: Hookbox, alice: httpx.Client, drain: Callable[[], None], api: httpx.Client
) -> None:
    add()
    alice.patch(
        "/api/preferences",
        json={"events": {"private.*": {"webhook": False}, "private.but": {"webhook": True}}},
    )
    quiet = post(event_name="private.talk", severity="warning")
    post(event_name="private.but", severity="warning")
    drain()
    assert [hit.json["data"]["event_name"] for hit in hookbox.requests] == ["private.but"]
    [delivery] = alice.get(f"/api/notifications/{quiet['id']}").json()["deliveries"]
    assert (delivery["status"], delivery["reason"]) == ("suppressed", "preference_off")


def test_each_endpoint_is_a_target_with_a_delivery_of_its_own(
    add: Any, post: Post, hookbox: Hookbox, alice: httpx.Client, drain: Callable[[], None]
) -> None:
    good, bad = add("/good")["webhook"]["id"], add("/bad")["webhook"]["id"]
    hookbox.script("/bad", 503)
    id = post(severity="warning")["id"]
    drain()
    deliveries = alice.get(f"/api/notifications/{id}").json()["deliveries"]
    ends = {one["target"]: (one["status"], one["attempts"]) for one in deliveries}
    assert ends == {good: ("sent", 0), bad: ("queued", 1)}


def test_a_rotated_secret_signs_beside_each_old_one_for_a_day(
    add: Any, post: Post, api: httpx.Client, hookbox: Hookbox, sql: Sql, drain: Callable[[], None]
) -> None:
    made = add()
    known, id = [made["secret"]], made["webhook"]["id"]
    for _ in range(2):
        known.append(api.post(f"/api/webhooks/{id}/rotate").json()["secret"])
        post(severity="warning")
        drain()
        for secret in known:
            verified(secret, hookbox.requests[-1])
    assert api.post(f"/api/webhooks/{id}/test").json()["verdict"] == "sent"
    for secret in known:
        verified(secret, hookbox.requests[-1])
    until = "SELECT (jsonb_array_elements(old_secrets) ->> 'until')::timestamptz FROM webhook_endpoints"
    day = timedelta(hours=24)
    assert all(day - timedelta(minutes=1) < moment - datetime.now(UTC) <= day for (moment,) in sql(until))
    sql("UPDATE webhook_endpoints SET old_secrets = jsonb_set(old_secrets, '{1,until}', to_jsonb(now()))")
    post(severity="warning")
    drain()
    for secret in known[1:]:
        verified(secret, hookbox.requests[-1])
    with pytest.raises(WebhookVerificationError):
        verified(known[0], hookbox.requests[-1])
    newest = api.post(f"/api/webhooks/{id}/rotate").json()["secret"]
    assert newest not in known and len(sql(until)) == 2, "what signs no more is forgotten"


def test_secrets_are_shown_once_and_kept_encrypted(add: Any, api: httpx.Client, sql: Sql) -> None:
    made = add()
    secret = made["secret"].removeprefix("whsec_")
    assert made["webhook"].keys() >= {"id", "url", "events", "min_severity", "user_id"}
    assert secret not in api.get("/api/webhooks").text
    [row] = sql("SELECT secret, octet_length(secret) FROM webhook_endpoints")
    assert base64.b64decode(secret) not in bytes(row[0])


def test_a_ping_goes_at_once_and_says_how_it_went(
    add: Any, api: httpx.Client, hookbox: Hookbox, sql: Sql
) -> None:
    made = add()
    reply = api.post(f"/api/webhooks/{made['webhook']['id']}/test")
    assert reply.status_code == 200 and reply.json()["verdict"] == "sent"
    assert verified(made["secret"], hookbox.requests[0])["type"] == "ping"
    hookbox.script("/", (500, {}, "broken"))
    reply = api.post(f"/api/webhooks/{made['webhook']['id']}/test")
    assert (reply.json()["verdict"], reply.json()["error"]) == ("retry", "500 broken")
    assert sql("SELECT 1 FROM outbox") == []
    problem(api.post(f"/api/webhooks/{ANYBODY}/test"), 404)


def test_an_endpoint_is_changed_switched_off_and_on_and_deleted(
    add: Any, post: Post, api: httpx.Client, hookbox: Hookbox, drain: Callable[[], None]
) -> None:
    id = add("/old", min_severity="critical")["webhook"]["id"]
    changed = api.patch(f"/api/webhooks/{id}", json={"url": f"{hookbox.url}/new", "min_severity": "info"})
    assert changed.json()["webhook"]["url"] == f"{hookbox.url}/new"
    post()
    drain()
    for enabled, count in ((False, 1), (True, 2)):
        assert (
            api.patch(f"/api/webhooks/{id}", json={"enabled": enabled}).json()["webhook"]["enabled"]
            == enabled
        )
        post()
        drain()
        assert paths(hookbox) == ["/new"] * count
    assert api.delete(f"/api/webhooks/{id}").status_code == 204
    post()
    drain()
    assert len(hookbox.requests) == 2
    problem(api.delete(f"/api/webhooks/{id}"), 404)
    problem(api.patch(f"/api/webhooks/{id}", json={}), 404)
    problem(api.post(f"/api/webhooks/{id}/rotate"), 404)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "url"), ({"url": "ftp://example.org/"}, "url"), ({"url": "http://user:pw@127.0.0.1/"}, "url"),
    ({"url": "/relative"}, "url"), ({"url": "https://example.org/", "events": []}, "events"),
    ({"url": "https://example.org:65536/"}, "url"), ({"url": "https://example.org:99999/"}, "url"),
    ({"url": "https://[::1/"}, "url"), ({"url": "https://example..org/"}, "url"),
    ({"url": "https://.example.org/"}, "url"), ({"url": "https://example.org:port/"}, "url"),
    ({"url": "https://example.org/", "events": "*"}, "events"),
    ({"url": "https://example.org/", "min_severity": "loud"}, "min_severity"),
    ({"url": "https://example.org/", "user_id": ""}, "user_id"),
    ({"url": "https://example.org/", "colour": 1}, "colour"),
]  # fmt: skip


def test_a_wrong_endpoint_is_refused_by_name(api: httpx.Client, sql: Sql) -> None:
    for body, field in WRONG:
        problem(api.post("/api/webhooks", json=body), 400, field)
    assert sql("SELECT 1 FROM webhook_endpoints") == []


def test_every_address_that_can_be_connected_to_is_taken(api: httpx.Client) -> None:
    hosts = "example.org", "example.org.", "bücher.example", "[2001:db8::1]", "x_y.example.org", "192.0.2.1"
    for host in hosts:
        for port in ("", ":1", ":8443", ":59999", ":65535"):
            for rest in ("", "/", "/a..b:99999?c=[d]", "?c"):
                made = api.post("/api/webhooks", json={"url": f"https://{host}{port}{rest}"})
                assert made.status_code == 201, made.text


def test_a_webhook_to_an_address_inside_is_refused_and_never_called(
    delivering: Any, client: Any, make_key: Any, hookbox: Hookbox, sql: Sql
) -> None:
    """Nothing but 127.0.0.2 may be reached here; what is stored as a name or address is checked when connecting."""
    careful = delivering(outbound_allow="127.0.0.2/32", poll_seconds=0.05)
    api = client(careful.url, make_key("admin"))
    made = api.post("/api/webhooks", json={"url": f"http://localhost:{hookbox.port}/"}).json()
    reply = api.post(f"/api/webhooks/{made['webhook']['id']}/test").json()
    assert reply["verdict"] == "refused" and "not public" in reply["error"]
    assert not hookbox.requests


def test_plain_http_needs_an_allowed_address(serve: Any, client: Any, make_key: Any) -> None:
    api = client(serve().url, make_key("admin"))
    problem(api.post("/api/webhooks", json={"url": "http://example.org/"}), 400, "url")
    assert api.post("/api/webhooks", json={"url": "https://example.org/"}).status_code == 201
