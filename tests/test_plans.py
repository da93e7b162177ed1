"""At a million notifications the queries that everybody waits for take the index made for them."""

import json
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from conftest import SECRET, app, load_schema
from psycopg.conninfo import make_conninfo

Explain = Callable[..., dict[str, Any]]
SIZE, USERS, MESSAGES, WAITING = 1_000_000, 20_000, 100_000, 3_000
HEAVY, ID = "user-7", "018bcfe5-6807-7000-8000-000000000007"
BIG = {"notifications", "outbox", "deliveries"}
# Time-ordered ids of a million milliseconds; every twentieth notification is one heavy reader's.
UUID = "(lpad(to_hex(1700000000000 + n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid"
FILL = f"""
    DROP INDEX notifications_idempotency_key, notifications_unread, notifications_unsettled, outbox_window, outbox_tokens, outbox_turn,
               outbox_suspects, outbox_finished, deliveries_message, deliveries_id;
    INSERT INTO notifications (user_id, id, event_name, title, body, severity, idempotency_key, subject_key, read_at,
                               archived_at)
    SELECT CASE WHEN n % 20 = 0 THEN '{HEAVY}' ELSE 'user-' || n % {USERS} END, {UUID}, 'comment.created', 'Title',
           'Inside', 'info', CASE WHEN n % 2 = 0 THEN 'key-' || n END,
           CASE WHEN n % 10 = 0 THEN 'subject-' || n END, CASE WHEN n % 10 < 8 THEN now() END,
           CASE WHEN n % 10 = 0 THEN now() END
    FROM generate_series(1, {SIZE}) AS n ORDER BY 1, 2;
    INSERT INTO outbox (user_id, id, channel, target, digest, state, available_at, provider, finished_at)
    SELECT 'user-' || n % {USERS}, {UUID}, 'email', '00000000-0000-0000-0000-000000000000',
           CASE WHEN n % 3 = 0 THEN 'key:' || n END, CASE WHEN n <= {WAITING} THEN 'open' ELSE 'sent' END,
           now() + (n - {WAITING / 2}) * interval '1 second', 'email',
           CASE WHEN n > {WAITING} THEN now() - n * interval '1 minute' END
    FROM generate_series(1, {MESSAGES}) AS n;
    INSERT INTO deliveries (user_id, notification_id, channel, target, id, message_id, status)
    SELECT user_id, id, channel, target, id, id, CASE state WHEN 'open' THEN 'queued' ELSE 'sent' END
    FROM outbox WHERE (user_id, id) IN (SELECT user_id, id FROM notifications);
"""
ITEMS = [
    {"id": ID, "user_id": f"user-{n}", "event_name": "e", "title": "t", "body": "b", "severity": "info"}
    | {"data": {}, "idempotency_key": f"key-{n}", "private": False, "redacted": False}
    for n in range(32)
]
PAGE = {"user_id": HEAVY, "cursor": None, "archived": False, "unread": False, "event": None, "limit": 30}
CLAIM = {"room": 16, "share": 4, "busy": "{}", "lease": 60, "mail": True}
RESULTS = json.dumps([{"user_id": HEAVY, "id": ID, "claim_seq": 1, "verdict": "sent"}])
CASES = {
    "list_notifications": {"items": json.dumps([PAGE])},
    "list_notifications, the next page": {"items": json.dumps([PAGE | {"cursor": ID}])},
    "list_notifications, unread ones": {"items": json.dumps([PAGE | {"unread": True}])},
    "get_unread_count": {"user_id": HEAVY},
    "get_hint": {"user_id": HEAVY},
    "get_notification": {"user_id": HEAVY, "id": ID, "for_admin": False},
    "update_notification": {"user_id": HEAVY, "id": ID, "read": True, "archived": None},
    "update_all_notifications": {"user_id": "user-9", "before": None},
    "update_resolved_notifications": {"subject_key": "subject-10"},
    "create_notifications": {"items": json.dumps(ITEMS)},
    "claim_messages": CLAIM,
    "update_due_messages": {},
    "finish_messages": {"results": RESULTS},
    "release_messages": {"results": RESULTS},
    "retry_delivery": {"id": ID},
    "list_outbox": {"user_id": HEAVY},
}


def serving(query: str) -> set[str]:
    """The indexes of the big tables that schema.sql says serve a query."""
    found, begins = set[str](), r"(?m)^CREATE (?:UNIQUE )?INDEX (?:IF NOT EXISTS )?|\bCONSTRAINT (?=\w+_pkey)"
    for part in re.split(begins, (app.HERE / "schema.sql").read_text())[1:]:
        name, serves = part.split()[0], re.match(r"[^;]*?-- serves: (.*)|[^;]*;\s*-- serves: (.*)", part)
        if serves and re.search(rf"\b{query}\b", serves[1] or serves[2]) and name.split("_")[0] in BIG:
            found.add(name)
    return found


@pytest.fixture(scope="module")
def explain(cluster: SimpleNamespace) -> Iterator[Explain]:
    """Plans of queries on a database with a million notifications."""
    parts = {name: getattr(cluster, name) for name in ("host", "port", "user", "password")}

    def where(dbname: str) -> str:
        return make_conninfo(**{name: value for name, value in parts.items() if value}, dbname=dbname)

    with psycopg.connect(where("postgres"), autocommit=True) as server:
        server.execute("CREATE DATABASE bellhop_plans")
        try:
            load_schema(**parts, dbname="bellhop_plans")
            with psycopg.connect(where("bellhop_plans"), autocommit=True) as database:
                database.execute("SET synchronous_commit TO off; SET maintenance_work_mem TO '256MB'")
                database.execute(FILL)
                database.execute((app.HERE / "schema.sql").read_bytes())
                database.execute("VACUUM ANALYZE")
                yield lambda *asked: plan_of(database, *asked)
        finally:
            server.execute("DROP DATABASE bellhop_plans WITH (FORCE)")


def plan_of(database: psycopg.Connection, query: str, given: dict[str, Any], mode: str) -> dict[str, Any]:
    """The plan of a prepared query, made for these values or once for all."""
    settings = app.load_settings({"DATABASE_URL": "nowhere", "BELLHOP_SECRET": SECRET})
    bound, names = app.create_app(settings).state.service.db.bound, list[str]()
    text = (app.HERE / "queries" / f"{query}.sql").read_text()
    for name in re.findall(r"%\((\w+)\)s", text):
        names += [name] if name not in names else []
    numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", text).replace("%%", "%")
    values = [psycopg.adapt.Transformer().as_literal({**bound, **given}[name]).decode() for name in names]
    with database.transaction(force_rollback=True):
        database.execute(f"DEALLOCATE ALL; SET LOCAL plan_cache_mode TO {mode}")
        database.execute(f"PREPARE asked AS {numbered}", prepare=False)
        listed = f"({', '.join(values)})" if values else ""
        [(told,)] = database.execute(f"EXPLAIN (FORMAT JSON) EXECUTE asked {listed}").fetchall()
    return json.loads(bytes(told))[0]["Plan"]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes, the plan itself included."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


def used(plan: dict[str, Any]) -> set[str]:
    """The indexes of a plan, those that find a conflict included."""
    found = {node["Index Name"] for node in nodes(plan) if "Index Name" in node}
    return found.union(*(node.get("Conflict Arbiter Indexes", ()) for node in nodes(plan)))


def scanned(plan: dict[str, Any]) -> set[str]:
    """The big tables that a plan reads from end to end."""
    return {node["Relation Name"] for node in nodes(plan) if node["Node Type"] == "Seq Scan"} & BIG


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_no_query_reads_a_big_table_from_end_to_end(explain: Explain, mode: str) -> None:
    plans = {case: explain(case.partition(",")[0], given, mode) for case, given in CASES.items()}
    assert {case: scanned(plan) for case, plan in plans.items() if scanned(plan)} == {}


@pytest.mark.parametrize("case", CASES)
def test_the_indexes_that_serve_a_query_are_used(explain: Explain, case: str) -> None:
    query = case.partition(",")[0]
    plan = explain(query, CASES[case], "force_custom_plan")
    meant = serving(query) - ({"notifications_pkey"} if case.endswith("unread ones") else set())
    assert meant <= used(plan)


def test_the_conflict_of_a_repeated_key_is_found_by_its_index(explain: Explain) -> None:
    plan = explain("create_notifications", CASES["create_notifications"], "force_generic_plan")
    arbiters = {name for node in nodes(plan) for name in node.get("Conflict Arbiter Indexes", ())}
    assert "notifications_idempotency_key" in arbiters


def test_the_four_queries_that_matter_most_are_served_by_an_index() -> None:
    assert serving("list_notifications") >= {"notifications_pkey", "notifications_unread"}
    assert "notifications_unread" in serving("get_unread_count")
    assert "notifications_idempotency_key" in serving("create_notifications")
    assert "outbox_turn" in serving("claim_messages")


def test_reading_from_end_to_end_is_noticed(explain: Explain) -> None:
    plan = explain("get_stats", {}, "force_custom_plan")
    assert scanned(plan) == {"deliveries"}, "counting everything is the one query that has to"
