"""Requests in flight together share one statement, and none of them pays for another's fault."""

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest
from conftest import Running, app, eventually
from psycopg.conninfo import conninfo_to_dict

Sql = Callable[..., list[tuple[Any, ...]]]
NOTE = {"event_name": "comment.created", "title": "A comment", "body": "Inside"}
JSON = {"Content-Type": "application/json"}


def at_once(requests: list[tuple[str, str, str]], key: str) -> list[httpx.Response]:
    """Post (service, path, body) all at the same time, and give the answers in order."""

    async def post_all() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {key}", **JSON}
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(headers=headers, trust_env=False, timeout=15, limits=limits) as client:
            return await asyncio.gather(
                *(client.post(url + path, content=body) for url, path, body in requests)
            )

    return asyncio.run(post_all())


def beside_a_bad_one(
    service: Running, requests: list[tuple[str, str, str]], key: str, at: int = 0
) -> list[httpx.Response]:
    """The answers to requests in one statement with an item that PostgreSQL alone refuses, as it must."""
    intake, replies = service.service.intake, list[httpx.Response]()
    asking = threading.Thread(target=lambda: replies.extend(at_once(requests, key)))
    service.call(intake.turn.acquire())
    asking.start()
    eventually(lambda: len(intake.waiting) == len(requests))
    bad = asyncio.run_coroutine_threadsafe(intake.ask([{"id": "no id"}]), service.loop)
    eventually(lambda: len(intake.waiting) == len(requests) + 1)
    intake.waiting.rotate(at)
    intake.before = len(intake.waiting)  # so that the next statement is for all of them
    service.loop.call_soon_threadsafe(intake.turn.release)
    asking.join()
    with pytest.raises(psycopg.DataError):
        bad.result(15)
    return replies


def test_one_bad_item_among_31_good_ones_in_flight_fails_alone(
    serve: Callable[..., Running], make_key: Callable[[str], str], sql: Sql
) -> None:
    service, key = serve(delivery_concurrency=0), make_key("send")
    for turn in range(5):
        bodies = [json.dumps({"user_id": f"u{turn}-{number}", **NOTE}) for number in range(31)]
        requests = [(service.url, "/api/notifications", body) for body in bodies]
        replies = beside_a_bad_one(service, requests, key, at=turn * 7)
        for body, reply in zip(bodies, replies, strict=True):
            assert reply.status_code == 201
            assert reply.json()["notification"]["user_id"] == json.loads(body)["user_id"]
    assert sql("SELECT count(*) FROM notifications") == [(5 * 31,)]


def test_a_bad_batch_in_flight_takes_no_other_down(
    serve: Callable[..., Running], make_key: Callable[[str], str], sql: Sql
) -> None:
    service, key = serve(delivery_concurrency=0), make_key("send")
    single = json.dumps({"user_id": "alice", **NOTE})
    bad = single[:-1] + ', "data": {"n": 1e999999}}'
    batch = f'{{"notifications": [{single}, {single}]}}'
    broken = f'{{"notifications": [{single}, {bad}, {single}]}}'
    requests = [(service.url, "/api/notifications", single)] * 10
    requests += [(service.url, "/api/notifications/batch", batch)] * 5
    replies = beside_a_bad_one(service, requests, key)
    assert [reply.status_code for reply in replies] == [201] * 15
    replies = at_once([*requests, *[(service.url, "/api/notifications/batch", broken)] * 5], key)
    assert [reply.status_code for reply in replies] == [201] * 15 + [400] * 5
    assert sql("SELECT count(*) FROM notifications") == [(40,)]


def test_nobody_waits_for_the_patience_of_another(
    serve: Callable[..., Running], make_key: Callable[[str], str], database: str
) -> None:
    """One spoils the statement, so each is asked for by itself; those that hang do so together."""
    service, key = serve(delivery_concurrency=0), make_key("send")
    held = [json.dumps({**NOTE, "user_id": "alice", "idempotency_key": "held"})] * 4
    with psycopg.connect(database) as stranger:
        stranger.execute("INSERT INTO notifications (user_id, id, event_name, title, body, severity, idempotency_key)"
                         " VALUES ('alice', gen_random_uuid(), 'e', 't', 'b', 'info', 'held')")  # fmt: skip
        requests = [(service.url, "/api/notifications", body) for body in held]
        replies = beside_a_bad_one(service, requests, key)
        stranger.rollback()
    waited = [reply.elapsed.total_seconds() for reply in replies if reply.status_code == 503]
    assert len(waited) == len(held) and max(waited) - min(waited) < app.PATIENCE


def test_a_locked_row_delays_its_own_request_alone(
    serve: Callable[..., Running], make_key: Callable[[str], str], database: str
) -> None:
    service, key = serve(delivery_concurrency=0), make_key("send")
    bodies = [{**NOTE, "user_id": "alice", "idempotency_key": "held"}]
    bodies += [{**NOTE, "user_id": f"bob-{number}"} for number in range(5)]
    requests = [(service.url, "/api/notifications", json.dumps(body)) for body in bodies]
    with psycopg.connect(database) as stranger:
        stranger.execute("INSERT INTO notifications (user_id, id, event_name, title, body, severity, idempotency_key)"
                         " VALUES ('alice', gen_random_uuid(), 'e', 't', 'b', 'info', 'held')")  # fmt: skip
        replies = at_once(requests, key)
        assert [reply.status_code for reply in replies] == [503] + [201] * 5
        stranger.rollback()
    assert at_once(requests[:1], key)[0].status_code == 201


def test_a_statement_that_gives_up_after_its_request_leaves_no_trace(
    serve: Callable[..., Running], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(delivery_concurrency=0)
    pool, db = service.service.pool, service.service.db.bind(patience=0.2)
    with psycopg.connect(database) as stranger:
        stranger.execute("INSERT INTO notification_preferences (user_id) VALUES ('alice')")
        with pytest.raises(TimeoutError):
            service.call(db.one("update_preferences", user_id="alice", by_user=False, patch="{}"))
        eventually(lambda: pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"])
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_everyone_gets_their_own_row_back(
    serve: Callable[..., Running], make_key: Callable[[str], str], sql: Sql
) -> None:
    service, key = serve(delivery_concurrency=0), make_key("send")
    bodies = [
        {"user_id": f"u{n % 5}", **NOTE, "title": f"{n}", "idempotency_key": f"k{n // 2}"} for n in range(200)
    ]
    replies = at_once([(service.url, "/api/notifications", json.dumps(body)) for body in bodies], key)
    stored = {
        str(id): (user, title) for id, user, title in sql("SELECT id, user_id, title FROM notifications")
    }
    for body, reply in zip(bodies, replies, strict=True):
        note = reply.json()["notification"]
        assert (note["user_id"], note["idempotency_key"]) == (body["user_id"], body["idempotency_key"])
        assert stored[note["id"]] == (note["user_id"], note["title"])
        assert (
            note["inserted"]
            == (reply.status_code == 201)
            == (note["title"] == body["title"] and note["inserted"])
        )


def test_batches_with_overlapping_keys_in_opposite_order_never_deadlock(
    serve: Callable[..., Running], make_key: Callable[[str], str], sql: Sql
) -> None:
    """200 opposing pairs, two services on one database; digests and limits are fought for as well."""
    first, second = (serve(delivery_concurrency=0, email_per_minute=3) for _ in range(2))
    key = make_key("send")
    sql("INSERT INTO notification_preferences (user_id, email, email_enabled, min_severity) "
        "SELECT 'u' || n, 'u' || n || '@example.com', true, 'info' FROM generate_series(0, 4) n")  # fmt: skip
    for turn in range(100):
        items = [
            {
                "user_id": f"u{number % 5}", **NOTE, "idempotency_key": f"{turn}-{number}",
                "batch_key": f"b{number % 3}" if number % 2 else None,
            }
            for number in range(10)
        ]  # fmt: skip
        there = json.dumps({"notifications": items})
        back = json.dumps({"notifications": items[::-1]})
        replies = at_once(
            [
                (one.url, "/api/notifications/batch", body)
                for body in (there, back)
                for one in (first, second)
            ],
            key,
        )
        assert [reply.status_code for reply in replies] == [201] * 4, [reply.text for reply in replies]
        ids = [sorted(result["id"] for result in reply.json()["results"]) for reply in replies]
        assert ids[0] == ids[1] == ids[2] == ids[3]
        assert sum(result["inserted"] for reply in replies for result in reply.json()["results"]) == 10
    assert sql("SELECT count(*), count(DISTINCT idempotency_key) FROM notifications") == [(1000, 1000)]
    assert sql("SELECT count(*) FROM deliveries") == [(1000,)]
    assert sql("SELECT count(*) FROM outbox WHERE digest IS NOT NULL AND state = 'open'")[0][0] <= 5 * 4


def test_a_statement_that_lost_a_deadlock_is_run_again(
    serve: Callable[..., Running], make_key: Callable[[str], str], database: str, sql: Sql
) -> None:
    sql(f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} SET deadlock_timeout TO '100ms'")
    service, key = serve(delivery_concurrency=0), make_key("send")
    note = {**NOTE, "user_id": "alice", "subject_key": "invoice:42"}
    notes = json.dumps({"notifications": [note, note]})
    (made,) = at_once([(service.url, "/api/notifications/batch", notes)], key)
    first, second = (result["id"] for result in made.json()["results"])
    touch = "UPDATE notifications SET updated_at = now() WHERE id = %s"
    replies: list[httpx.Response] = []
    settle = (service.url, "/api/resolve", '{"subject_key": "invoice:42"}')
    asking = threading.Thread(target=lambda: replies.extend(at_once([settle], key)))
    with psycopg.connect(database) as stranger:  # the patient one: PostgreSQL ends our statement
        stranger.execute("SET LOCAL deadlock_timeout TO '30s'")
        stranger.execute(touch, [second])
        asking.start()
        eventually(lambda: sql("SELECT pid FROM pg_locks WHERE NOT granted"))
        stranger.execute(touch, [first])
    asking.join()
    assert [reply.json() for reply in replies] == [{"resolved": 2}]
    counted = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    eventually(lambda: sql(counted) == [(1,)])


def test_a_statement_takes_half_of_those_around(
    serve: Callable[..., Running], make_key: Callable[[str], str]
) -> None:
    """PostgreSQL works on one half while the other is answered; nobody of eight waits for a third statement."""
    service, key = serve(delivery_concurrency=0), make_key("send")
    intake, sizes, replies = service.service.intake, list[int](), list[httpx.Response]()
    intake.after = lambda rows: sizes.append(len(rows))
    requests = [(service.url, "/api/notifications", json.dumps({**NOTE, "user_id": "alice"}))] * 8
    asking = threading.Thread(target=lambda: replies.extend(at_once(requests, key)))
    service.call(intake.turn.acquire())
    asking.start()
    eventually(lambda: len(intake.waiting) == len(requests))
    service.loop.call_soon_threadsafe(intake.turn.release)
    asking.join()
    assert sizes == [4, 4] and {reply.status_code for reply in replies} == {201}
