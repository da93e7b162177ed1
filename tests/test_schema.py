"""schema.sql: applied again, by several at once, over data; never by older code over a newer database."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from conftest import SECRET, Running, user_token
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import app

Sql = Callable[..., list[tuple[Any, ...]]]
SCHEMA_VERSION = 1  # as schema.sql says at its head and at its end
SHAPE = """
    SELECT 'column', table_name, column_name, data_type, is_nullable, column_default
    FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL SELECT 'index', tablename, indexname, indexdef, '', '' FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', ''
              FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT 'view', viewname, definition, '', '', '' FROM pg_views WHERE schemaname = 'public'
    ORDER BY 1, 2, 3, 4"""


@pytest.fixture
def empty(database: str, sql: Sql) -> str:
    """The conninfo of this test's database after everything in it is gone."""
    sql("DROP SCHEMA public CASCADE")
    sql("CREATE SCHEMA public")
    return database


def apply(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute((app.HERE / "schema.sql").read_bytes())


def test_applied_again_it_changes_nothing(database: str, sql: Sql) -> None:
    before = sql(SHAPE)
    assert len(before) > 100
    for _ in range(2):
        apply(database)
    assert sql(SHAPE) == before
    assert sql("SELECT version FROM schema_version") == [(SCHEMA_VERSION,)]


def test_eight_services_that_start_at_once_agree(empty: str, database: str, sql: Sql) -> None:
    async def apply_once() -> None:
        async with await app.connect(empty) as connection:
            await app.apply_schema(connection)

    async def apply_all() -> None:
        await asyncio.gather(*(apply_once() for _ in range(8)))

    asyncio.run(apply_all())
    first = sql(SHAPE)
    sql("DROP SCHEMA public CASCADE")
    sql("CREATE SCHEMA public")
    apply(database)
    assert sql(SHAPE) == first


def test_two_processes_that_start_at_once_on_an_empty_database_both_succeed(
    empty: str, tmp_path: Path, sql: Sql
) -> None:
    environ = {"DATABASE_URL": empty, "BELLHOP_HOME": str(tmp_path), "BELLHOP_SECRET": SECRET, "PATH": ""}
    program = [sys.executable, "-W", "error", str(Path(app.__file__)), "key", "create", "x"]
    starting = [
        subprocess.Popen(program, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=30) for process in starting]
    assert [process.returncode for process in starting] == [0, 0], ended
    assert sql("SELECT count(*) FROM api_keys") == [(2,)]


def test_applied_over_data_it_keeps_all_of_it(
    service: Running, api: httpx.Client, contents: Callable[[], dict[str, list[str]]], client: Any
) -> None:
    api.put("/api/users/alice", json={"email": "alice@example.com"})
    api.patch(
        "/api/users/alice/preferences", json={"email_enabled": True, "events": {"a.*": {"push": False}}}
    )
    for number in range(10):
        body = {
            "user_id": "alice",
            "event_name": "e",
            "title": f"{number}",
            "body": "b",
            "severity": "warning",
        }
        assert api.post("/api/notifications", json=body | {"batch_key": "k"}).status_code == 201
    before = contents()
    apply(service.database)
    assert contents() == before
    alice = client(service.url, user_token("alice"))
    assert alice.get("/api/unread-count").json() == {"unread_count": 10}


def test_a_service_at_work_does_not_mind_another_that_starts(
    serve: Callable[..., Running], client: Any, make_key: Callable[[str], str]
) -> None:
    program = client(serve().url, make_key("send"))
    for number in range(4):
        serve()
        body = {"user_id": "alice", "event_name": "e", "title": f"{number}", "body": "b"}
        assert program.post("/api/notifications", json=body).status_code == 201


def test_a_newer_database_is_refused_and_left_alone(database: str, sql: Sql) -> None:
    sql("INSERT INTO schema_version (version) VALUES (%s)", SCHEMA_VERSION + 1)
    sql("DROP VIEW inbox")
    before = sql(SHAPE)

    async def start() -> None:
        async with await app.connect(database) as connection:
            await app.apply_schema(connection)

    with pytest.raises(app.StartError, match="newer"):
        asyncio.run(start())
    assert sql(SHAPE) == before


def test_a_database_that_cannot_hold_every_letter_is_refused(database: str, sql: Sql) -> None:
    ((version,),) = sql("SELECT current_setting('server_version_num')::int")
    locale = "LC_COLLATE 'C' LC_CTYPE 'C'" + " LOCALE_PROVIDER libc" * (version >= 150000)
    sql(f"CREATE DATABASE narrow TEMPLATE template0 ENCODING 'LATIN1' {locale}")
    try:
        with pytest.raises(psycopg.errors.RaiseException, match="UTF8"):
            apply(make_conninfo(database, dbname="narrow"))
    finally:
        sql("DROP DATABASE narrow")


def test_text_is_utf8_whatever_the_database_would_speak(database: str, sql: Sql) -> None:
    sql(f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} SET client_encoding TO 'LATIN1'")

    async def echo() -> Any:
        async with await app.connect(database) as connection:
            return await (await connection.execute("SELECT %s::text", ["שלום 👍"])).fetchone()

    assert asyncio.run(echo()) == ("שלום 👍",)


def test_what_users_chose_by_default_is_the_same_in_both_places(sql: Sql) -> None:
    """The view for users without a row, and the columns' defaults for those who get one."""
    sql("INSERT INTO notification_preferences (user_id) VALUES ('alice')")
    (row,) = sql(
        "SELECT to_jsonb(p) - 'user_id' = to_jsonb(d) FROM notification_preferences p, default_preferences d"
    )
    assert row == (True,)


def test_every_table_of_a_user_is_led_by_the_user(sql: Sql) -> None:
    keys = sql(
        "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE contype IN ('p', 'f') AND connamespace = 'public'::regnamespace"
    )
    owned = {"notifications", "notification_preferences", "push_subscriptions", "outbox", "deliveries",
             "rate_limits", "suppressions"}  # fmt: skip
    found = {table for table, _ in keys if table in owned}
    assert found == owned
    for table, definition in keys:
        assert table not in owned or "KEY (user_id" in definition, (table, definition)


def test_webhooks_that_wait_in_an_older_line_keep_their_minutes(sql: Sql) -> None:
    sql("INSERT INTO outbox (user_id, id, channel, target, available_at, token_minute, provider)"
        " SELECT 'alice', gen_random_uuid(), 'webhook', gen_random_uuid(), minute + n * interval '1 minute', minute, 'webhook:a'"
        " FROM date_trunc('minute', now()) AS minute, generate_series(1, 3) AS n")  # fmt: skip
    sql((app.HERE / "schema.sql").read_text())
    assert sql("SELECT bool_and(token_minute = available_at) FROM outbox") == [(True,)]
