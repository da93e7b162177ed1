"""When PostgreSQL goes away or hangs: a quick 503, a quick return, and no acknowledged write is lost."""

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from conftest import SECRET, Running, eventually, problem, user_token

import app

BODY = {"user_id": "alice", "event_name": "e", "title": "t", "body": "b"}
NEW_CONNECTIONS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"""


class Cluster:
    """A PostgreSQL of the test's own, which may be stopped, started and frozen."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.start()

    def start(self) -> None:
        self.running = contextlib.ExitStack()
        self.url = self.running.enter_context(app.embedded_postgres(self.home))

    def stop(self) -> None:
        self.running.close()

    def signal(self, how: signal.Signals) -> None:
        """Send a signal to the server and all its children."""
        server = int((self.home / "pg18" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        for pid in (server, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        options = "-c default_transaction_read_only=off"
        with psycopg.connect(self.url, autocommit=True, options=options) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture
def own() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="bh-"))
    folder.chmod(0o755)
    cluster = Cluster(folder / "home")
    yield cluster
    with contextlib.suppress(FileNotFoundError):
        cluster.signal(signal.SIGCONT)
    cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture
def service(own: Cluster, tmp_path: Path) -> Iterator[Running]:
    """A service on the test's own cluster."""
    environ = {
        "DATABASE_URL": own.url, "BELLHOP_HOME": str(tmp_path), "BELLHOP_SECRET": SECRET, "BELLHOP_PORT": "0",
    }  # fmt: skip
    running = Running(app.load_settings(environ))
    yield running
    running.stop()


@pytest.fixture
def key(own: Cluster, service: Running) -> str:
    secret = "bh_of-this-test"
    digest = app.hashlib.sha256(secret.encode()).digest()
    own.sql("INSERT INTO api_keys (name, scope, hash) VALUES ('test', 'send', %s)", digest)
    return secret


@pytest.fixture
def program(service: Running, key: str, client: Callable[..., httpx.Client]) -> httpx.Client:
    return client(service.url, key)


def refused_quickly(ask: Callable[[], httpx.Response]) -> None:
    """A 503 that says when to try again, within 3 seconds."""
    started = time.monotonic()
    reply = ask()
    assert time.monotonic() - started < 3
    assert problem(reply, 503)["code"] == "database_away"
    assert 1 <= int(reply.headers["retry-after"]) <= 10


def test_a_database_that_goes_away_and_returns_costs_nothing_but_the_time(
    own: Cluster, service: Running, program: httpx.Client, alice: httpx.Client
) -> None:
    acknowledged = [
        program.post("/api/notifications", json=BODY).json()["notification"]["id"] for _ in range(20)
    ]
    assert alice.get("/api/unread-count").json() == {"unread_count": 20}
    own.stop()
    left = time.monotonic()
    while time.monotonic() - left < 6:  # longer than the pool tries to reconnect by itself
        refused_quickly(lambda: program.post("/api/notifications", json=BODY))
        refused_quickly(lambda: alice.get("/api/notifications"))
        refused_quickly(lambda: alice.patch("/api/notifications", json={"all": True}))
        time.sleep(0.5)
    assert alice.get("/health/live").status_code == 200
    down = alice.get("/health/ready")
    assert down.status_code == 503 and "database" in down.text and down.headers["retry-after"]
    own.start()
    back = time.monotonic()
    eventually(lambda: program.post("/api/notifications", json=BODY).status_code == 201, 5)
    eventually(lambda: alice.get("/api/notifications").status_code == 200, 5 - (time.monotonic() - back))
    eventually(lambda: alice.get("/health/ready").status_code == 200)
    stored = {str(id) for (id,) in own.sql("SELECT id FROM notifications")}
    assert set(acknowledged) <= stored
    assert own.sql("SELECT count(*) FROM notifications WHERE read_at IS NOT NULL") == [(0,)]


def test_a_database_that_hangs_is_answered_like_one_that_is_away(
    own: Cluster, service: Running, program: httpx.Client, key: str, alice: httpx.Client
) -> None:
    program.post("/api/notifications", json=BODY)
    alice.get("/api/notifications")

    async def ask_all(number: int) -> list[tuple[float, int]]:
        proofs = ({"Authorization": f"Bearer {key}"}, {"Authorization": f"Bearer {user_token('alice')}"})

        async def ask(at: int) -> tuple[float, int]:
            started = time.monotonic()
            if at % 2:
                reply = await client.get("/api/notifications", headers=proofs[1])
            else:
                body = BODY | {"idempotency_key": f"k{at}"}
                reply = await client.post("/api/notifications", headers=proofs[0], json=body)
            return time.monotonic() - started, reply.status_code

        async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=15) as client:
            return await asyncio.gather(*(ask(at) for at in range(number)))

    patient = [
        ("POST", "/api/notifications/batch", {"notifications": [BODY] * 500}), ("GET", "/api/users/alice/export", None),
        ("POST", "/api/resolve", {"subject_key": "s"}), ("DELETE", "/api/users/alice", None),
        ("GET", "/metrics", None),
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as many:  # at once, so that each finds an idle connection to hang on
        list(many.map(lambda _: alice.get("/api/outbox").raise_for_status(), range(80)))
        own.signal(signal.SIGSTOP)
        asked = [
            functools.partial(program.request, method, path, json=body) for method, path, body in patient
        ]
        list(many.map(refused_quickly, asked))
    replies = asyncio.run(ask_all(30)) + asyncio.run(ask_all(30))
    assert {status for _, status in replies} == {503}
    assert max(seconds for seconds, _ in replies) < 3
    refused_quickly(lambda: alice.get("/api/unread-count"))
    own.signal(signal.SIGCONT)
    eventually(lambda: alice.get("/api/notifications").status_code == 200, 5)
    again = asyncio.run(ask_all(30))
    assert {status for _, status in again} <= {200, 201}, "what was refused may be sent again"
    doubles = own.sql("SELECT idempotency_key FROM notifications GROUP BY 1 HAVING count(*) > 1")
    assert [key for (key,) in doubles if key] == []
    eventually(lambda: alice.get("/health/ready").status_code == 200)


def test_connections_notice_a_network_that_swallows_everything(own: Cluster, service: Running) -> None:
    """Else what hangs keeps its place in the pool until the kernel gives up, after a quarter of an hour."""

    async def parameters() -> list[dict[str, str]]:
        alone = await app.connect(own.url)
        async with service.service.pool.connection() as pooled, alone:
            return [connection.info.get_parameters() for connection in (pooled, alone)]

    for told in service.call(parameters()):
        assert int(told["tcp_user_timeout"]) <= 5000, "milliseconds"
        seconds = [int(told[f"keepalives_{name}"]) for name in ("idle", "interval", "count")]
        assert seconds[0] + seconds[1] * seconds[2] <= 60


def test_a_service_whose_database_hangs_ends_when_it_is_told_to(own: Cluster, service: Running) -> None:
    """What cannot be written down any more is not waited for twice: the lease will run out."""
    worker, waited = service.service.worker, list[float]()
    eventually(lambda: service.service.loops.tasks)
    own.signal(signal.SIGSTOP)
    eventually(worker.claiming.locked)
    for _ in range(2):
        started = time.monotonic()
        with contextlib.suppress(TimeoutError):
            service.call(worker.stop())
        waited.append(time.monotonic() - started)
    own.signal(signal.SIGCONT)
    assert waited[0] < app.STOP_SECONDS and waited[1] < waited[0] / 2, waited


def test_a_database_that_only_reads_is_away_to_who_wants_to_write(
    own: Cluster, service: Running, program: httpx.Client, alice: httpx.Client
) -> None:
    own.sql("ALTER DATABASE postgres SET default_transaction_read_only = on")
    own.sql(NEW_CONNECTIONS)
    eventually(lambda: alice.get("/api/notifications").status_code == 200)
    refused_quickly(lambda: program.post("/api/notifications", json=BODY))
    refused_quickly(lambda: alice.patch("/api/preferences", json={"digest_minutes": 1}))
    own.sql("ALTER DATABASE postgres RESET default_transaction_read_only")
    own.sql(NEW_CONNECTIONS)
    eventually(lambda: program.post("/api/notifications", json=BODY).status_code == 201)


def test_cut_connections_are_replaced(
    own: Cluster, service: Running, program: httpx.Client, alice: httpx.Client
) -> None:
    acknowledged = 0
    for _ in range(5):
        own.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'bellhop'")
        for _ in range(10):
            acknowledged += program.post("/api/notifications", json=BODY).status_code == 201
        eventually(lambda: program.get("/api/users/alice").status_code == 200, 5)
    assert acknowledged >= 25, "a cut costs few requests, not all"
    assert own.sql("SELECT count(*) FROM notifications")[0][0] >= acknowledged
    eventually(lambda: alice.get("/api/unread-count").json()["unread_count"] >= acknowledged, 5)
