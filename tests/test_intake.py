"""Intake: notifications for later, or written by another program in its own transaction; stored exactly once."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from conftest import Running, app, eventually, problem
from peers import Mailbox
from psycopg.types.json import Jsonb

Sql = Callable[..., list[tuple[Any, ...]]]
BODY = {"user_id": "alice", "event_name": "invoice.due", "title": "Invoice 42", "body": "Inside"}
NOBODY = "12345678-1234-4123-8123-123456789012"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture
def program(database: str) -> Any:
    """Another program on the same PostgreSQL."""
    with psycopg.connect(database) as connection:
        yield connection


def put(program: psycopg.Connection, body: dict[str, Any], due_at: datetime | None = None) -> str:
    row = program.execute(
        "INSERT INTO intake (payload, due_at) VALUES (%s, coalesce(%s, now())) RETURNING id",
        (Jsonb(body), due_at),
    ).fetchone()
    assert row
    return str(row[0])


def later(**delta: float) -> str:
    return (datetime.now(UTC) + timedelta(**delta)).isoformat()


def inbox(user: httpx.Client) -> list[dict[str, Any]]:
    return user.get("/api/notifications").json()["notifications"]


# ─── From inside a transaction ───


def test_a_row_becomes_a_notification_when_its_transaction_commits(
    service: Running, program: psycopg.Connection, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    put(program, BODY | {"data": {"n": 1}, "subject_key": "s"})
    drain()
    assert inbox(alice) == []
    program.commit()
    [stored] = eventually(lambda: inbox(alice))
    assert (stored["title"], stored["data"], stored["subject_key"]) == ("Invoice 42", {"n": 1}, "s")
    assert stored["idempotency_key"] is None
    assert sql("SELECT 1 FROM intake") == []


def test_a_transaction_that_is_rolled_back_tells_nobody(
    service: Running, program: psycopg.Connection, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    put(program, BODY)
    program.rollback()
    put(program, BODY | {"title": "after"})
    program.commit()
    eventually(lambda: inbox(alice))
    drain()
    assert [one["title"] for one in inbox(alice)] == ["after"]


def test_it_leaves_like_any_other(
    service: Running, program: psycopg.Connection, reach: Any, mailbox: Mailbox, drain: Callable[[], None]
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    put(program, BODY | {"severity": "warning"})
    program.commit()
    drain()
    mailbox.wait(1)
    assert mailbox.messages[0].subject == "Invoice 42"


def test_a_row_waits_until_it_is_due(
    service: Running, program: psycopg.Connection, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    put(program, BODY, datetime.now(UTC) + timedelta(hours=1))
    program.commit()
    drain()
    assert inbox(alice) == []
    sql("UPDATE intake SET due_at = now()")
    eventually(lambda: inbox(alice))


def test_thousands_of_rows_and_three_services_store_each_exactly_once(
    service: Running, delivering: Any, program: psycopg.Connection, sql: Sql, drain: Callable[[], None]
) -> None:
    delivering(delivery_concurrency=0)
    delivering(delivery_concurrency=0)
    with program.cursor().copy("COPY intake (payload) FROM STDIN") as copy:
        for number in range(3000):
            copy.write_row([Jsonb(BODY | {"user_id": f"user{number % 50}", "title": str(number)})])
    program.commit()
    drain()
    assert sql("SELECT count(*), count(DISTINCT title) FROM notifications") == [(3000, 3000)]
    assert sql("SELECT count(*) FROM intake") == [(0,)]


def test_a_worker_that_dies_between_reading_and_storing_loses_and_doubles_nothing(
    service: Running, program: psycopg.Connection, sql: Sql, drain: Callable[[], None]
) -> None:
    """The row is read and handed on twice, as after a crash: the second time it is not there any more."""
    id = put(program, BODY)
    program.execute("UPDATE intake SET error = 'so that the service leaves it alone'")
    program.commit()
    raw = app.Raw(app.encode(BODY).encode())
    for _ in range(3):
        service.call(service.service.worker.take_in(app.UUID(id), raw))
    assert sql("SELECT count(*) FROM notifications") == [(1,)]
    assert sql("SELECT count(*) FROM intake") == [(0,)]


def test_a_turn_that_fails_waits_for_what_it_began(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next turn would find rows that are still on their way, and take them in beside themselves."""
    bell = service.service
    worker, order = app.Worker(bell.settings, bell.db, bell.intake, bell.outbound), list[str]()

    async def rows(*_: Any, **__: Any) -> list[dict[str, Any]]:
        return [{"id": "fails", "payload": b""}, {"id": "takes its time", "payload": b""}]

    async def take_in(id: str, payload: bytes) -> None:
        if id == "fails":
            raise TimeoutError
        await asyncio.sleep(0.1)
        order.append(id)

    async def turn() -> None:
        with contextlib.suppress(TimeoutError):
            await worker.intake_turn()
            order.append("no error")
        order.append("the turn ends")

    monkeypatch.setattr(worker.db, "many", rows)
    monkeypatch.setattr(worker, "take_in", take_in)
    service.call(turn())
    assert order == ["takes its time", "the turn ends"]


def test_keys_count_as_in_a_post(
    service: Running, program: psycopg.Connection, api: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    first = api.post("/api/notifications", json=BODY | {"resource_id": "7"}).json()["notification"]
    put(program, BODY | {"resource_id": "7", "title": "again"})
    put(program, BODY | {"idempotencyKey": "k"})
    put(program, BODY | {"idempotency_key": "k"})
    program.commit()
    drain()
    eventually(lambda: sql("SELECT count(*) FROM intake") == [(0,)])
    assert sql("SELECT count(*) FROM notifications") == [(2,)]
    assert sql("SELECT title FROM notifications WHERE id = %s", first["id"]) == [("Invoice 42",)]


def test_a_row_may_be_for_many(service: Running, program: psycopg.Connection, sql: Sql, drain: Any) -> None:
    put(
        program,
        {key: value for key, value in BODY.items() if key != "user_id"} | {"user_ids": ["a", "b", "c"]},
    )
    program.commit()
    drain()
    assert sql("SELECT user_id FROM notifications ORDER BY 1") == [("a",), ("b",), ("c",)]


def test_nothing_is_stored_for_who_switched_in_app_off(
    service: Running, program: psycopg.Connection, reach: Any, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", in_app_enabled=False)
    put(program, BODY)
    program.commit()
    drain()
    eventually(lambda: sql("SELECT count(*) FROM intake") == [(0,)])
    assert sql("SELECT count(*) FROM notifications") == [(0,)]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"title": None}, "title"), ({"title": "x" * 201}, "title"), ({"colour": 1}, "colour"), ({"user_id": None}, "user_id"),
    ({"severity": "loud"}, "severity"), ({"target_url": "javascript:1"}, "target_url"), ({"user_ids": []}, "user_ids"),
    ({"deliver_at": "2030-01-01T00:00:00Z"}, "deliver_at"),
]  # fmt: skip


def test_a_bad_payload_stays_with_its_reason_and_holds_nobody_up(
    service: Running, program: psycopg.Connection, sql: Sql, drain: Callable[[], None]
) -> None:
    put(program, BODY | {"title": "before"})
    bad = {put(program, BODY | change): words for change, words in BAD}
    put(program, BODY | {"title": "after"})
    program.commit()
    drain()
    eventually(lambda: sql("SELECT count(*) FROM notifications") == [(2,)])
    kept = dict(sql("SELECT id::text, error FROM intake WHERE payload ->> 'event_name' = 'invoice.due'"))
    assert kept.keys() == bad.keys()
    assert all(bad[id] in error for id, error in kept.items())


def test_what_is_no_body_at_all_stays_too(service: Running, sql: Sql, drain: Callable[[], None]) -> None:
    payloads = ["[]", "1", "null", '"text"', "{}", '{"data": {"deep": ' + "[" * 40 + "]" * 40 + "}}"]
    for payload in (*payloads, app.encode(BODY)):
        sql("INSERT INTO intake (payload) VALUES (%s::jsonb)", payload)
    eventually(lambda: sql("SELECT count(*) FROM intake WHERE error <> ''") == [(len(payloads),)])
    drain()
    assert sql("SELECT count(*) FROM notifications") == [(1,)]


def test_a_payload_that_breaks_us_is_kept_and_holds_nobody_up(
    service: Running,
    program: psycopg.Connection,
    sql: Sql,
    drain: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A fault of ours: it must neither stop the loop nor lose the row."""
    usual = app.make_item

    def fragile(user_id: str, asked: Any, *rest: Any) -> Any:
        if asked.title == "trap":
            raise ZeroDivisionError
        return usual(user_id, asked, *rest)

    monkeypatch.setattr(app, "make_item", fragile)
    put(program, BODY | {"title": "trap"})
    put(program, BODY)
    program.commit()
    drain()
    eventually(lambda: sql("SELECT count(*) FROM notifications") == [(1,)])
    assert sql("SELECT payload ->> 'title', error FROM intake") == [("trap", "Something went wrong here")]
    assert "ZeroDivisionError" in caplog.text


# ─── Through HTTP ───


def test_a_repeated_deliver_at_with_a_key_is_kept_once(api: httpx.Client, sql: Sql) -> None:
    body, due_at = BODY | {"idempotency_key": "rent 2027-01"}, later(hours=1)
    first = api.post("/api/notifications", json=body | {"deliver_at": due_at}).json()["scheduled"]
    again = api.post("/api/notifications", json=body | {"deliver_at": later(hours=2)})
    assert again.status_code == 202 and again.json()["scheduled"] == first
    other = api.post("/api/notifications", json=body | {"deliver_at": due_at, "user_id": "bob"}).json()
    assert other["scheduled"]["id"] != first["id"]
    assert api.delete(f"/api/scheduled/{first['id']}").status_code == 204
    assert sql("SELECT payload ->> 'user_id' FROM intake") == [("bob",)]


def test_who_is_erased_is_taken_off_a_list_that_waits(service: Running, api: httpx.Client, sql: Sql) -> None:
    body = {"event_name": "e", "title": "t", "body": "b"}
    for field in ("user_ids", "userIds"):
        for users in (["alice", "bob"], ["alice"], ["carol"]):
            waiting = Jsonb(body | {field: users})
            sql("INSERT INTO intake (payload, due_at) VALUES (%s, now() + interval '1 day')", waiting)
    shown = api.get("/api/users/alice/export").json()["scheduled"]
    assert [one["payload"] for one in shown] == [body] * 4, "nobody reads who else is on the list"
    assert api.delete("/api/users/alice").status_code == 204
    left = sql(
        "SELECT coalesce(payload -> 'user_ids', payload -> 'userIds')::text, payload ->> 'body' FROM intake"
    )
    assert sorted(left) == [('["bob"]', "b")] * 2 + [('["carol"]', "b")] * 2


def test_what_failed_is_taken_anew_by_a_repeated_request(api: httpx.Client, sql: Sql) -> None:
    body = BODY | {"idempotency_key": "again", "deliver_at": later(hours=1)}
    first = api.post("/api/notifications", json=body).json()["scheduled"]["id"]
    sql("UPDATE intake SET error = 'broken'")
    again = api.post("/api/notifications", json=body | {"title": "Mended"}).json()["scheduled"]["id"]
    assert sql("SELECT id::text, payload ->> 'title', error FROM intake") == [(first, "Mended", None)]
    assert first == again


def test_what_is_scheduled_anew_is_not_taken_for_what_was_cancelled(
    service: Running, api: httpx.Client, sql: Sql
) -> None:
    """The worker read the first one when it was due; before it is stored, it is cancelled and asked for again."""
    body = BODY | {"idempotency_key": "again"}
    scheduled = api.post("/api/notifications", json=body | {"deliver_at": later(hours=1)}).json()["scheduled"]
    first = scheduled["id"]
    assert api.delete(f"/api/scheduled/{first}").status_code == 204
    anew = body | {"title": "Another", "deliver_at": later(hours=2)}
    assert api.post("/api/notifications", json=anew).json()["scheduled"]["id"] == first
    for read in (body, body | {"title": ""}):
        service.call(service.service.worker.take_in(app.UUID(first), app.Raw(app.encode(read).encode())))
    assert sql("SELECT payload ->> 'title', error FROM intake") == [("Another", None)]
    assert sql("SELECT count(*) FROM notifications") == [(0,)]


def test_a_post_with_deliver_at_is_202_and_stored_when_due(
    api: httpx.Client, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    due_at = later(hours=3)
    reply = api.post("/api/notifications", json=BODY | {"deliver_at": due_at})
    assert reply.status_code == 202, reply.text
    scheduled = reply.json()["scheduled"]
    assert scheduled.keys() == {"id", "due_at"}
    assert datetime.fromisoformat(scheduled["due_at"]) == datetime.fromisoformat(due_at)
    drain()
    assert inbox(alice) == []
    sql("UPDATE intake SET due_at = now()")
    [stored] = eventually(lambda: inbox(alice))
    assert (stored["title"], stored["idempotency_key"]) == ("Invoice 42", None)


def test_a_moment_that_has_passed_is_now(api: httpx.Client, alice: httpx.Client) -> None:
    assert api.post("/api/notifications", json=BODY | {"deliverAt": later(hours=-1)}).status_code == 202
    eventually(lambda: inbox(alice))


def test_it_can_be_cancelled_until_it_is_stored(
    api: httpx.Client, alice: httpx.Client, sql: Sql, drain: Callable[[], None]
) -> None:
    ids = [
        api.post("/api/notifications", json=BODY | {"deliver_at": later(hours=3)}).json()["scheduled"]["id"]
        for _ in range(2)
    ]
    reply = api.delete(f"/api/scheduled/{ids[0]}")
    assert (reply.status_code, reply.content) == (204, b"")
    problem(api.delete(f"/api/scheduled/{ids[0]}"), 404)
    sql("UPDATE intake SET due_at = now()")
    eventually(lambda: inbox(alice))
    drain()
    assert len(inbox(alice)) == 1
    problem(api.delete(f"/api/scheduled/{ids[1]}"), 404)
    problem(api.delete(f"/api/scheduled/{NOBODY}"), 404)
    problem(alice.delete(f"/api/scheduled/{NOBODY}"), 403)


def test_a_cancel_that_is_confirmed_is_never_stored_however_close(
    client: Any, make_key: Any, service: Running, sql: Sql, drain: Callable[[], None]
) -> None:
    """A hundred fall due while they are being cancelled: each is either stored or cancelled."""
    rows = sql("INSERT INTO intake (payload, due_at) SELECT %s::jsonb, now() + n * interval '5 ms'"
               " FROM generate_series(1, 100) AS n RETURNING id", app.encode(BODY))  # fmt: skip
    key, cancelled = make_key("send"), list[str]()

    def cancel(part: list[str]) -> None:
        program = client(service.url, key)
        cancelled.extend(id for id in part if program.delete(f"/api/scheduled/{id}").status_code == 204)

    threads = [
        threading.Thread(target=cancel, args=([str(id) for (id,) in rows[start::4]],)) for start in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drain()
    eventually(lambda: sql("SELECT count(*) FROM intake") == [(0,)])
    assert sql("SELECT count(*) FROM notifications") == [(100 - len(cancelled),)]


@pytest.mark.parametrize(
    ("asked", "due"),
    [
        ("9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59+00:00"),
        ("0001-01-01T00:00:00+12:00", "0001-01-01T00:00:00+00:00"),
        ("2100-01-01T00:00:00+15:30", "2099-12-31T08:30:00+00:00"),
    ],
)
def test_a_due_time_is_one_that_every_client_reads(api: httpx.Client, asked: str, due: str) -> None:
    reply = api.post("/api/notifications", json=BODY | {"deliver_at": asked})
    assert reply.status_code == 202 and reply.json()["scheduled"]["due_at"] == due


def test_an_offset_that_no_clock_has_is_refused_by_name(api: httpx.Client) -> None:
    reply = api.post("/api/notifications", json=BODY | {"deliver_at": "2100-01-01T00:00:00+23:59"})
    problem(reply, 400, "deliver_at")


def test_a_bad_body_is_refused_at_once_not_when_due(api: httpx.Client, sql: Sql) -> None:
    good = BODY | {"deliver_at": later(hours=1)}
    nobody = {key: value for key, value in good.items() if key != "user_id"}
    for body, field in [
        (good | {"deliver_at": "tomorrow"}, "deliver_at"), (good | {"deliver_at": "2030-01-01T00:00:00"}, "deliver_at"),
        (good | {"title": ""}, "title"), (nobody | {"user_ids": ["a"]}, "deliver_at"),
    ]:  # fmt: skip
        problem(api.post("/api/notifications", json=body), 400, field)
    assert sql("SELECT 1 FROM intake") == []


def test_whatever_a_post_may_hold_is_stored_when_due(api: httpx.Client, alice: httpx.Client) -> None:
    """The key made of a long resource, and data that PostgreSQL writes longer than the caller did."""
    resource, data = "r" * 255, {"n": [1] * 8_000}
    body = BODY | {"resource_id": resource, "data": data, "deliver_at": later(hours=-1)}
    assert api.post("/api/notifications", json=body).status_code == 202
    [stored] = eventually(lambda: inbox(alice))
    assert (stored["idempotency_key"], stored["data"]) == (f"alice:invoice.due:{resource}", data)


def test_it_is_part_of_what_is_held_about_a_user_and_erased_with_it(api: httpx.Client, sql: Sql) -> None:
    api.post("/api/notifications", json=BODY | {"deliver_at": later(hours=1)})
    assert "Invoice 42" in api.get("/api/users/alice/export").text
    assert api.delete("/api/users/alice").status_code == 204
    assert sql("SELECT 1 FROM intake") == []


def test_it_is_held_about_its_user_in_either_spelling(api: httpx.Client, sql: Sql) -> None:
    sql("INSERT INTO intake (payload, due_at) VALUES (%s::jsonb, now() + interval '1 hour')",
        '{"userId": "alice", "eventName": "invoice.due", "title": "Invoice 42", "body": "Inside"}')  # fmt: skip
    assert "Invoice 42" in api.get("/api/users/alice/export").text
    assert api.delete("/api/users/alice").status_code == 204
    assert sql("SELECT 1 FROM intake") == []
