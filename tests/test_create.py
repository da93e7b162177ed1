"""What a program sends is stored once, answered in full, and told to the right channels at the right time."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from conftest import Running, browser, problem

Json = dict[str, Any]
Client = Callable[..., httpx.Client]
Sql = Callable[..., list[tuple[Any, ...]]]
NOTE: Json = {"user_id": "alice", "event_name": "comment.created", "title": "A comment", "body": "Inside"}
FULL: Json = NOTE | {
    "summary": "Short", "target_url": "https://example.com/x?y=1#z", "severity": "success",
    "data": {"a": [1, None, "é"]}, "idempotency_key": "key-1", "batch_key": "post:7",
    "subject_key": "invoice:42", "private": True,
}  # fmt: skip
CAMEL: Json = {
    "userId": "alice", "eventName": "comment.created", "title": "A comment", "body": "Inside",
    "summary": "Short", "targetUrl": "https://example.com/x?y=1#z", "severity": "success",
    "data": {"a": [1, None, "é"]}, "idempotencyKey": "key-2", "batchKey": "post:7",
    "subjectKey": "invoice:42", "private": True,
}  # fmt: skip
FIELDS = [
    "id", "user_id", "event_name", "title", "body", "summary", "target_url", "severity", "data",
    "idempotency_key", "batch_key", "subject_key", "read_at", "archived_at", "created_at", "updated_at",
    "inserted",
]  # fmt: skip


@pytest.fixture
def service(serve: Callable[..., Running]) -> Running:
    """A service that sends nothing: what creation decided stays as it was."""
    return serve(delivery_concurrency=0, email_per_minute=5)


@pytest.fixture
def prefer(api: httpx.Client) -> Callable[..., None]:
    """Set a user's choices; an address comes with them."""

    def choose(user_id: str = "alice", email: str | None = "alice@example.com", **choices: Any) -> None:
        assert api.put(f"/api/users/{user_id}", json={"email": email}).status_code == 200
        assert api.patch(f"/api/users/{user_id}/preferences", json=choices).status_code == 200

    return choose


@pytest.fixture
def told(api: httpx.Client) -> Callable[..., list[Json]]:
    """What the answer to a post says about its channels."""

    def send(**fields: Any) -> list[Json]:
        reply = api.post("/api/notifications", json=NOTE | fields)
        assert reply.status_code == 201, reply.text
        return reply.json()["deliveries"]

    return send


def in_minutes(delivery: Json) -> float:
    """How far away the moment is at which it may leave."""
    return (datetime.fromisoformat(delivery["available_at"]) - datetime.now(UTC)).total_seconds() / 60


# ─── What is stored and answered ───


def test_every_field_is_stored_and_answered(api: httpx.Client, alice: httpx.Client) -> None:
    sent = api.post("/api/notifications", json=FULL)
    assert sent.status_code == 201
    note = sent.json()["notification"]
    assert sorted(note) == sorted(FIELDS)
    assert {name: note[name] for name in FULL if name != "private"} == {
        name: value for name, value in FULL.items() if name != "private"
    }
    assert note["inserted"] is True and note["read_at"] is None and note["archived_at"] is None
    for moment in (note["created_at"], note["updated_at"]):
        at = datetime.fromisoformat(moment)
        assert at.tzinfo and abs(datetime.now(UTC) - at) < timedelta(seconds=20)
    assert UUID(note["id"]).version == 7
    del note["inserted"]
    assert alice.get(f"/api/notifications/{note['id']}").json()["notification"] == note
    assert alice.get("/api/notifications").json()["notifications"] == [note]


def test_only_three_fields_are_needed(api: httpx.Client) -> None:
    note = api.post("/api/notifications", json=NOTE).json()["notification"]
    assert note["severity"] == "info" and note["data"] == {}
    for name in ("summary", "target_url", "idempotency_key", "batch_key", "subject_key"):
        assert note[name] is None


def test_camel_case_and_a_mix_of_both_mean_the_same(api: httpx.Client, sql: Sql) -> None:
    mixed = {"user_id": "alice", "eventName": "comment.created", "title": "A comment", "body": "Inside",
             "summary": "Short", "targetUrl": "https://example.com/x?y=1#z", "severity": "success",
             "data": {"a": [1, None, "é"]}, "idempotency_key": "key-3", "batchKey": "post:7",
             "subject_key": "invoice:42", "private": True}  # fmt: skip
    notes = [
        api.post("/api/notifications", json=body).json()["notification"] for body in (FULL, CAMEL, mixed)
    ]
    for note in notes:
        for own in ("id", "idempotency_key", "created_at", "updated_at"):
            del note[own]
    assert notes[0] == notes[1] == notes[2]
    assert sql("SELECT count(*), bool_and(private) FROM notifications") == [(3, True)]


def test_field_names_inside_data_are_left_alone(api: httpx.Client) -> None:
    data = {"someKey": {"innerKey": 1}, "some_key": 2, "UPPER": 3}
    note = api.post("/api/notifications", json=CAMEL | {"data": data}).json()["notification"]
    assert note["data"] == data


# ─── Keys ───


def test_a_repeated_key_returns_the_first_notification(api: httpx.Client, sql: Sql, prefer: Any) -> None:
    prefer(email_enabled=True, min_severity="info")
    first = api.post("/api/notifications", json=FULL)
    again = api.post("/api/notifications", json=FULL | {"title": "Other", "severity": "critical"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert len(first.json()["deliveries"]) == 1
    assert again.json() == {
        "notification": first.json()["notification"] | {"inserted": False}, "deliveries": [],
    }  # fmt: skip
    assert sql("SELECT count(*) FROM notifications") == sql("SELECT count(*) FROM deliveries") == [(1,)]


def test_a_repeat_of_a_read_one_stays_read(api: httpx.Client, alice: httpx.Client) -> None:
    sent = api.post("/api/notifications", json=FULL).json()["notification"]
    read = alice.patch("/api/notifications", json={"notification_id": sent["id"]}).json()["notification"]
    again = api.post("/api/notifications", json=FULL).json()["notification"]
    assert again["read_at"] == read["read_at"] and again["updated_at"] == read["updated_at"]
    assert alice.get("/api/unread-count").json() == {"unread_count": 0}


def test_the_key_is_the_fields_the_headers_or_the_resources(api: httpx.Client) -> None:
    def key_of(header: str | None = None, **fields: Any) -> Any:
        headers = {"Idempotency-Key": header} if header else {}
        return api.post("/api/notifications", json=NOTE | fields, headers=headers).json()["notification"][
            "idempotency_key"
        ]

    assert key_of() is None
    assert key_of(idempotency_key="field") == "field"
    assert key_of("header") == "header"
    assert key_of("header", idempotency_key="field2") == "field2"
    assert key_of(resource_id="7") == "alice:comment.created:7"
    assert key_of("header2", resource_id="7") == "header2"
    assert key_of(resourceId="8") == "alice:comment.created:8"


def test_a_resource_has_a_key_however_long_the_names_are(api: httpx.Client) -> None:
    """Every name at its limit, in characters of four bytes that no compression makes shorter."""
    letters = random.Random(1)
    user, event, resource, other = (
        "".join(chr(letters.randrange(0x20000, 0x2A000)) for _ in range(size))
        for size in (200, 120, 255, 255)
    )
    fields = NOTE | {"user_id": user, "event_name": event}
    for named, status in ((resource, 201), (resource, 200), (other, 201)):
        reply = api.post("/api/notifications", json=fields | {"resource_id": named})
        assert reply.status_code == status, reply.text


def test_the_same_key_is_another_notification_for_another_user(api: httpx.Client) -> None:
    codes = [
        api.post("/api/notifications", json=FULL | {"user_id": user}).status_code for user in ("alice", "bob")
    ]
    assert codes == [201, 201]


def test_without_a_key_every_post_is_a_new_one(api: httpx.Client, sql: Sql) -> None:
    assert {api.post("/api/notifications", json=NOTE).status_code for _ in range(3)} == {201}
    assert sql("SELECT count(*), count(DISTINCT id) FROM notifications") == [(3, 3)]


def test_fifty_equal_posts_at_once_are_one_row_and_fifty_equal_answers(
    service: Running, serve: Callable[..., Running], make_key: Callable[[str], str], sql: Sql, prefer: Any
) -> None:
    """From two services on one database, too."""
    prefer(email_enabled=True, min_severity="info")
    key, urls = make_key("send"), [service.url, serve(delivery_concurrency=0).url]

    async def post_all() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(headers=headers, trust_env=False, timeout=15) as one:
            posts = (one.post(f"{urls[number % 2]}/api/notifications", json=FULL) for number in range(50))
            return await asyncio.gather(*posts)

    replies = asyncio.run(post_all())
    assert sorted(reply.status_code for reply in replies) == [200] * 49 + [201]
    bodies = [reply.json() for reply in replies]
    for reply, body in zip(replies, bodies, strict=True):
        assert body["notification"].pop("inserted") is (reply.status_code == 201)
        assert len(body.pop("deliveries")) == (reply.status_code == 201)
    assert all(body == bodies[0] for body in bodies)
    for table in ("notifications", "deliveries", "outbox"):
        assert sql(f"SELECT count(*) FROM {table}") == [(1,)]


# ─── Many at once ───


def test_user_ids_gives_one_to_each_in_order(api: httpx.Client, sql: Sql) -> None:
    body = {name: value for name, value in FULL.items() if name != "user_id"}
    users = [f"u{number}" for number in range(40)] + ["u3", "u3"]
    sent = api.post("/api/notifications", json=body | {"user_ids": users})
    assert sent.status_code == 201
    results = sent.json()["results"]
    assert [one["user_id"] for one in results] == users
    assert [one["inserted"] for one in results] == [True] * 40 + [False] * 2
    assert results[40]["id"] == results[41]["id"] == results[3]["id"]
    assert sql("SELECT count(*), count(DISTINCT user_id) FROM notifications") == [(40, 40)]
    again = api.post("/api/notifications", json=body | {"userIds": users})
    assert again.status_code == 201 and not any(one["inserted"] for one in again.json()["results"])
    assert [one["id"] for one in again.json()["results"]] == [one["id"] for one in results]


def test_the_largest_is_told_to_a_thousand(api: httpx.Client, sql: Sql) -> None:
    """What is asked goes to PostgreSQL once, and no copy of it comes back."""
    users, large = [f"u{n}" for n in range(1000)], {"body": "b" * 8000, "data": {"x": "y" * 16_000}}
    note = {"event_name": "comment.created", "title": "A comment", "user_ids": users, **large}
    reply = api.post("/api/notifications", json=note, timeout=30)
    assert reply.status_code == 201
    results = reply.json()["results"]
    assert [result["user_id"] for result in results] == users
    assert len(reply.content) < 200_000 and all(result["inserted"] for result in results)
    assert sql("SELECT count(*), min(length(body)), min(length(data ->> 'x')) FROM notifications") == [
        (1000, 8000, 16_000)
    ]


def test_user_ids_with_a_resource_get_a_key_each(api: httpx.Client, sql: Sql) -> None:
    body = {name: value for name, value in NOTE.items() if name != "user_id"}
    api.post("/api/notifications", json=body | {"user_ids": ["a", "b"], "resource_id": "9"})
    keys = sql("SELECT idempotency_key FROM notifications ORDER BY 1")
    assert keys == [("a:comment.created:9",), ("b:comment.created:9",)]


def test_a_batch_is_answered_in_order_and_a_key_given_twice_is_one_row(api: httpx.Client, sql: Sql) -> None:
    items = [NOTE | {"user_id": f"u{number % 7}", "title": f"{number}"} for number in range(100)]
    items[10] |= {"idempotency_key": "same", "user_id": "u1"}
    items[90] |= {"idempotencyKey": "same", "user_id": "u1"}
    sent = api.post("/api/notifications/batch", json={"notifications": items})
    assert sent.status_code == 201, sent.text
    results = sent.json()["results"]
    assert [one["user_id"] for one in results] == [item["user_id"] for item in items]
    assert results[10]["id"] == results[90]["id"]
    assert [one["inserted"] for one in (results[10], results[90])] == [True, False]
    titles = dict(sql("SELECT id::text, title FROM notifications"))
    assert len(titles) == 99
    assert all(titles[one["id"]] == f"{n}" for n, one in enumerate(results) if n != 90)


def test_a_batch_lies_in_the_inbox_in_its_order(api: httpx.Client, alice: httpx.Client) -> None:
    items = [NOTE | {"title": f"{number}"} for number in range(100)]
    assert api.post("/api/notifications/batch", json={"notifications": items}).status_code == 201
    listed = alice.get("/api/notifications?limit=100").json()["notifications"]
    assert [note["title"] for note in listed] == [f"{number}" for number in reversed(range(100))]


def test_a_batch_with_one_bad_item_stores_nothing_and_names_it(api: httpx.Client, sql: Sql) -> None:
    for bad, field in (
        ({"title": "x" * 201}, "title"), ({"severity": "odd"}, "severity"),
        ({"targetUrl": "javascript:x"}, "target_url"), ({"user_id": ""}, "user_id"),
        ({"nonsense": 1}, "nonsense"), ({"data": {"x": "y" * 17_000}}, "data"),
        ({"user_id": None}, "user_id"), ({"body": None}, "body"), ({"deliver_at": "x"}, "deliver_at"),
    ):  # fmt: skip
        items = [NOTE | {"title": f"{number}"} for number in range(20)]
        items[13] |= bad
        for spelled in (items, [*items[:5], CAMEL, *items[5:]]):
            reply = api.post("/api/notifications/batch", json={"notifications": spelled})
            problem(reply, 400, f"notifications[{spelled.index(items[13])}].{field}")
    assert sql("SELECT count(*) FROM notifications") == [(0,)]


def test_a_batch_that_the_database_refuses_stores_nothing(api: httpx.Client, sql: Sql) -> None:
    good = ",".join([json.dumps(NOTE)] * 5)
    bad = json.dumps(NOTE)[:-1] + ', "data": {"n": 1e999999}}'
    body = f'{{"notifications": [{good}, {bad}, {good}]}}'
    reply = api.post("/api/notifications/batch", content=body, headers={"Content-Type": "application/json"})
    problem(reply, 400)
    assert sql("SELECT count(*) FROM notifications") == [(0,)]


def test_ten_times_as_many_with_many_targets_do_not_take_a_hundred_times_as_long(
    api: httpx.Client, sql: Sql
) -> None:
    """Each of the thousand has e-mail, three browsers and three webhooks: as a loop over all pairs that is minutes."""
    users = "FROM generate_series(0, 999) AS n"
    sql(
        f"INSERT INTO notification_preferences (user_id, email, email_enabled, push_enabled) SELECT 'u' || n, 'a@b.c', true, true {users}"
    )
    sql(
        "INSERT INTO push_subscriptions (user_id, endpoint, host, p256dh, auth)"
        f" SELECT 'u' || n, 'https://push.example/' || n || '/' || k, 'push.example', 'x', 'y' {users}, generate_series(1, 3) AS k"
    )
    for path in range(3):
        assert api.post("/api/webhooks", json={"url": f"https://hook.example/{path}"}).status_code == 201

    def seconds(size: int, severity: str) -> float:
        bodies = [NOTE | {"user_id": f"u{n}", "severity": severity} for n in range(size)]
        started = time.perf_counter()
        assert api.post("/api/notifications/batch", json={"notifications": bodies}).status_code == 201
        return time.perf_counter() - started

    for severity in ("warning", "critical"):
        few = min(seconds(100, severity) for _ in range(3))
        assert seconds(1000, severity) < 40 * few, "ten times the work, not a hundred times"
    assert sql("SELECT count(*) FROM deliveries") == [(2 * 1300 * 7,)]


def test_a_thousand_in_a_batch_or_for_a_thousand_users_are_all_stored(api: httpx.Client, sql: Sql) -> None:
    users = [f"user-{number}" for number in range(1000)]
    items = [NOTE | {"user_id": user} for user in users]
    assert api.post("/api/notifications/batch", json={"notifications": items}).status_code == 201
    body = {name: value for name, value in NOTE.items() if name != "user_id"}
    assert api.post("/api/notifications", json=body | {"user_ids": users}).status_code == 201
    assert sql("SELECT count(*), count(DISTINCT user_id) FROM notifications") == [(2000, 1000)]


# ─── Preview ───


def test_a_preview_says_what_the_post_would_and_stores_nothing(
    api: httpx.Client, prefer: Any, contents: Callable[[], Json]
) -> None:
    prefer(email_enabled=True, push_enabled=True)
    for fields in (
        {}, {"severity": "warning"}, {"severity": "critical", "batch_key": "b"},
        {"severity": "warning", "batch_key": "b"},
    ):  # fmt: skip
        before = contents()
        preview = api.post("/api/notifications/preview", json=NOTE | fields)
        assert preview.status_code == 200 and contents() == before
        post = api.post("/api/notifications", json=NOTE | fields)
        told, done = preview.json(), post.json()
        assert told.keys() == done.keys() and told["notification"].keys() == done["notification"].keys()
        for one in (told, done):
            for own in ("id", "created_at", "updated_at"):
                del one["notification"][own]
            for delivery in one["deliveries"]:
                delivery["available_at"] = delivery["available_at"] and round(in_minutes(delivery))
        assert told == done
    api.post("/api/notifications", json=FULL)
    seen = api.post("/api/notifications/preview", json=FULL)
    assert seen.status_code == 200 and seen.json()["notification"]["inserted"] is False
    assert seen.json()["deliveries"] == []


def test_a_preview_takes_user_ids_and_both_spellings_too(api: httpx.Client, contents: Any) -> None:
    before = contents()
    body = {name: value for name, value in CAMEL.items() if name != "userId"}
    reply = api.post("/api/notifications/preview", json=body | {"userIds": ["a", "b", "a"]})
    told = [(one["user_id"], one["inserted"]) for one in reply.json()["results"]]
    assert told == [("a", True), ("b", True), ("a", False)]
    problem(api.post("/api/notifications/preview", json=CAMEL | {"title": ""}), 400, "title")
    assert contents() == before


# ─── In-app switched off ───


def test_for_a_user_without_in_app_nothing_is_stored_or_sent(
    api: httpx.Client, prefer: Any, contents: Callable[[], Json]
) -> None:
    prefer(in_app_enabled=False, email_enabled=True)
    before = contents()
    reply = api.post("/api/notifications", json=FULL | {"severity": "critical"})
    assert reply.status_code == 200 and reply.json() == {"notification": None, "deliveries": []}
    preview = api.post("/api/notifications/preview", json=FULL)
    assert preview.status_code == 200 and preview.json() == {"notification": None, "deliveries": []}
    many = {name: value for name, value in FULL.items() if name != "user_id"} | {"user_ids": ["alice"]}
    assert api.post("/api/notifications", json=many).json() == {
        "results": [{"user_id": "alice", "id": None, "inserted": False}]
    }
    assert contents() == before
    both = api.post("/api/notifications", json=many | {"user_ids": ["alice", "bob"]}).json()["results"]
    assert [one["inserted"] for one in both] == [False, True]


# ─── Channels and reasons ───


def test_a_user_who_chose_nothing_is_told_in_the_app_only(told: Any) -> None:
    assert told(severity="critical") == []


def test_each_channel_switched_on_is_named_with_what_becomes_of_it(told: Any, prefer: Any) -> None:
    prefer(email_enabled=True)
    (mail,) = told(severity="warning")
    assert (mail["channel"], mail["status"], mail["reason"]) == ("email", "queued", None)
    assert abs(in_minutes(mail)) < 0.5
    prefer(email_enabled=True, push_enabled=True)
    found = {one["channel"]: (one["status"], one["reason"]) for one in told(severity="warning")}
    assert found == {"email": ("queued", None), "push": ("suppressed", "no_address")}


def test_severities_below_the_least_stay_in_the_app(told: Any, prefer: Any) -> None:
    order = ["info", "success", "warning", "critical"]
    for least in order:
        prefer(email_enabled=True, min_severity=least)
        for severity in order:
            (mail,) = told(severity=severity)
            above = order.index(severity) >= order.index(least)
            expected = ("queued", None) if above else ("suppressed", "below_severity")
            assert (mail["status"], mail["reason"]) == expected, (least, severity)
            assert (mail["available_at"] is not None) == above


def test_without_an_address_the_reason_is_no_address(told: Any, prefer: Any) -> None:
    prefer(email=None, email_enabled=True, min_severity="info")
    (mail,) = told(severity="critical")
    assert (mail["status"], mail["reason"], mail["available_at"]) == ("suppressed", "no_address", None)


def test_the_most_specific_event_switch_wins_also_for_critical(told: Any, prefer: Any) -> None:
    prefer(email_enabled=True, min_severity="info", events={
        "*": {"email": False}, "comment.*": {"email": True}, "comment.reply.*": {"email": False},
        "comment.reply.urgent": {"email": True}, "comment.muted": {"email": False},
        "comment": {"push": False},
    })  # fmt: skip
    for event, queued in {
        "other": False, "comment": False, "comment.created": True, "comment.muted": False,
        "comment.reply": True, "comment.reply.x": False, "comment.reply.urgent": True,
        "comment.reply.urgent.x": False, "commentx": False, "comment.": True, "COMMENT.created": False,
    }.items():  # fmt: skip
        for severity in ("info", "critical"):
            (mail,) = told(event_name=event, severity=severity)
            assert (mail["status"] == "queued") == queued, event
            assert mail["reason"] == (None if queued else "preference_off"), event


def test_an_unsubscribed_user_gets_no_mail_until_they_want_it_again(
    told: Any, prefer: Any, sql: Sql, alice: httpx.Client
) -> None:
    prefer(email_enabled=True)
    sql("INSERT INTO suppressions (user_id, channel, reason) VALUES ('alice', 'email', 'unsubscribed')")
    (mail,) = told(severity="critical")
    assert (mail["status"], mail["reason"]) == ("suppressed", "unsubscribed")
    assert alice.patch("/api/preferences", json={"email_enabled": True}).status_code == 200
    assert told(severity="critical")[0]["status"] == "queued"


def test_each_browser_is_a_push_target_of_its_own(
    told: Any, alice: httpx.Client, prefer: Any, sql: Sql
) -> None:
    prefer(push_enabled=True)
    for number in range(3):
        body = browser(f"https://push.example.com/{number}")
        assert alice.post("/api/push/subscriptions", json=body).status_code == 201
    pushes = told(severity="warning", batch_key="never collects a push")
    assert [(one["channel"], one["status"]) for one in pushes] == [("push", "queued")] * 3
    assert all(abs(in_minutes(one)) < 0.5 for one in pushes)
    assert sql("SELECT count(*), count(DISTINCT target), count(DISTINCT id) FROM outbox") == [(3, 3, 3)]


# ─── When it leaves ───


def test_a_batch_key_collects_until_the_digest_leaves(told: Any, prefer: Any, sql: Sql) -> None:
    prefer(email_enabled=True, min_severity="info", digest_minutes=10)
    (first,) = told(batch_key="post:7")
    assert 9 < in_minutes(first) < 10.1
    sql("UPDATE outbox SET available_at = available_at - interval '4 minutes'")
    (second,) = told(batch_key="post:7")
    assert 5 < in_minutes(second) < 6.1, "joining does not move the moment"
    (other,) = told(batch_key="post:8")
    assert 9 < in_minutes(other) < 10.1
    (alone,) = told()
    assert abs(in_minutes(alone)) < 0.5
    messages = sql("SELECT count(*) FROM deliveries GROUP BY message_id ORDER BY 1")
    assert messages == [(1,), (1,), (2,)]


def test_digest_minutes_of_zero_lets_all_leave_at_once(told: Any, prefer: Any) -> None:
    prefer(email_enabled=True, min_severity="info", digest_minutes=0)
    assert abs(in_minutes(told(batch_key="post:7")[0])) < 0.5


def test_critical_leaves_at_once_and_alone(told: Any, prefer: Any, sql: Sql) -> None:
    now = datetime.now(UTC)
    quiet = {
        "quiet_from": f"{now - timedelta(hours=2):%H:%M}",
        "quiet_to": f"{now + timedelta(hours=2):%H:%M}",
    }
    prefer(email_enabled=True, min_severity="info", **quiet)
    told(batch_key="post:7", severity="warning")
    for _ in range(2):
        assert abs(in_minutes(told(batch_key="post:7", severity="critical")[0])) < 0.5
    assert sql("SELECT count(*) FROM outbox WHERE available_at <= now()") == [(2,)]
    assert sql("SELECT count(*) FROM deliveries GROUP BY message_id") == [(1,), (1,), (1,)]


def test_quiet_hours_hold_all_but_critical_back_until_their_end(told: Any, prefer: Any, sql: Sql) -> None:
    for zone, offset in (("UTC", 0), ("Asia/Kolkata", 330), ("Asia/Tokyo", 540)):
        sql("DELETE FROM notifications")
        sql("DELETE FROM outbox")
        local = datetime.now(UTC).replace(tzinfo=None) + timedelta(minutes=offset)
        quiet = {
            "quiet_from": f"{local - timedelta(hours=2):%H:%M}",
            "quiet_to": f"{local + timedelta(hours=3):%H:%M}",
        }
        prefer(email_enabled=True, min_severity="info", timezone=zone, **quiet)
        for fields in ({}, {"batch_key": "b"}, {"severity": "warning"}):
            assert 178 < in_minutes(told(**fields)[0]) <= 180.1, zone
        assert sql("SELECT count(*) FROM outbox") == [(1,)], "they leave as one digest"
        assert abs(in_minutes(told(severity="critical")[0])) < 0.5
        outside = {"quiet_from": quiet["quiet_to"], "quiet_to": quiet["quiet_from"]}
        prefer(email_enabled=True, min_severity="info", timezone=zone, **outside)
        assert abs(in_minutes(told()[0])) < 0.5, zone


def test_over_the_limit_mails_fold_into_one_that_leaves_with_the_next_minute(
    told: Any, prefer: Any, sql: Sql
) -> None:
    prefer(email_enabled=True, min_severity="info")
    second = datetime.now(UTC).second
    if second > 45:  # a minute that turns in the middle starts the count anew
        sql("SELECT pg_sleep(%s)", 60 - second)
    mails = [told()[0] for _ in range(8)]
    assert all(abs(in_minutes(mail)) < 0.5 for mail in mails[:5])
    late = {mail["available_at"] for mail in mails[5:]}
    assert len(late) == 1 and 0 < in_minutes(mails[7]) <= 1
    assert datetime.fromisoformat(late.pop()).second == 0
    assert sql("SELECT count(*) FROM deliveries GROUP BY message_id ORDER BY 1") == [(1,)] * 5 + [(3,)]
    critical = [told(severity="critical")[0] for _ in range(33)]
    assert [in_minutes(mail) > 0 for mail in critical] == [False] * 30 + [True] * 3
    assert sql("SELECT count(*) FROM notifications") == [(41,)], "what is stored knows no limit"


def test_the_first_events_of_many_users_in_one_batch_open_one_window_each(
    api: httpx.Client, prefer: Any, sql: Sql
) -> None:
    for user in ("alice", "bob"):
        prefer(user, f"{user}@example.com", email_enabled=True, min_severity="info")
    items = [
        NOTE | {"user_id": user, "batch_key": key}
        for key in "xyx"
        for user in ("alice", "bob")
        for _ in range(4)
    ]
    assert api.post("/api/notifications/batch", json={"notifications": items}).status_code == 201
    assert sql("SELECT user_id, count(*) FROM outbox GROUP BY 1 ORDER BY 1") == [("alice", 2), ("bob", 2)]
    assert sql("SELECT count(*) FROM deliveries GROUP BY message_id ORDER BY 1") == [(4,), (4,), (8,), (8,)]


def test_an_acknowledged_notification_is_committed(api: httpx.Client, sql: Sql) -> None:
    for _ in range(20):
        sent = api.post("/api/notifications", json=NOTE | {"title": str(uuid4())}).json()["notification"]
        assert sql("SELECT title FROM notifications WHERE id = %s", sent["id"]) == [(sent["title"],)]
