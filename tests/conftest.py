"""The cast and the stage: a real PostgreSQL, the real service on a real port, Alice, Bob, programs."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pytest_postgresql import factories

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers import MARKER, Hookbox, Mailbox, Pushbox, hang_up_on_everybody, running, stop_listening

import app

SECRET = "a secret that is only good for tests, 32 bytes or more"
LINK_KEY = app.derive(SECRET, "link")
DEADLINE = 30  # seconds that nothing in a test may wait longer than
MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30  # a database for each test is made four times as fast there


@pytest.fixture(scope="session")
def cluster() -> Iterator[SimpleNamespace]:
    """PostgreSQL: the one TEST_DATABASE_URL names, or the service's own embedded one."""
    with contextlib.ExitStack() as stack:
        url = os.environ.get("TEST_DATABASE_URL")
        if not url:
            folder = MEMORY if MEMORY.exists() and shutil.disk_usage(MEMORY).free > ROOM else None
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bellhop-", dir=folder)))
            url = stack.enter_context(app.embedded_postgres(home))
        parts = conninfo_to_dict(url)
        with psycopg.connect(url, autocommit=True) as connection:
            if not os.environ.get("TEST_DATABASE_URL"):  # throw-away data need not be on the disk
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("SELECT pg_reload_conf()")
        yield SimpleNamespace(
            host=parts["host"], port=int(parts.get("port", 5432)), user=parts.get("user", "postgres"),
            password=parts.get("password"), options="", maintenance_dbname="postgres", template_dbname=None,
        )  # fmt: skip


def load_schema(**parts: Any) -> None:
    """Fill the template that every test's database is copied from."""
    text = (app.HERE / "schema.sql").read_bytes()
    parts = {name: value for name, value in parts.items() if value}
    with psycopg.connect(make_conninfo(**parts)) as connection:
        connection.execute(text)
        digest = {"digest": hashlib.sha256(text).hexdigest()}
        connection.execute(app.QUERIES["record_schema"].text, digest)


postgresql_proc = factories.postgresql_noproc(depends_on="cluster", dbname="bellhop", load=[load_schema])
postgresql = factories.postgresql("postgresql_proc")


@pytest.fixture
def database(postgresql: psycopg.Connection) -> str:
    """The conninfo of this test's own database."""
    info = postgresql.info
    parts = {"host": info.host, "port": info.port, "user": info.user, "dbname": info.dbname}
    return make_conninfo(**parts, password=info.password) if info.password else make_conninfo(**parts)


@pytest.fixture
def sql(postgresql: psycopg.Connection) -> Callable[..., list[tuple[Any, ...]]]:
    """Run a statement in this test's database and give its rows."""
    postgresql.autocommit = True

    def run(statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        cursor = postgresql.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []

    return run


class QuickServer(app.Server):
    """The server without uvicorn's pauses of a tenth of a second: over hundreds of tests they are a minute."""

    def __init__(self, config: uvicorn.Config, running: "Running") -> None:
        super().__init__(config)
        self.running = running

    async def main_loop(self) -> None:
        self.running.ready.set()
        self.ending = asyncio.Event()
        await self.on_tick(0)
        if not self.should_exit:
            await self.ending.wait()

    async def shutdown(self, sockets: Any = None) -> None:
        self.running.service.hub.close()
        for server in self.servers:
            await stop_listening(server)
        for _ in range(500):  # again and again: some were accepted but not yet known
            for connection in list(self.server_state.connections):
                connection.shutdown()
            await asyncio.sleep(0.01)
            if not self.server_state.connections:
                break
        await self.end_connections()
        await self._wait_tasks_to_complete()
        await self.lifespan.shutdown()
        await self.end_connections()

    async def end_connections(self) -> None:
        """End what a browser that was closed or killed left behind: a loop that ends does not close it."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next turn


class Running:
    """A service that runs in a thread of its own, on a port of its own."""

    judged = False  # the queries, by PostgreSQL: once for all tests

    def __init__(self, settings: app.Settings) -> None:
        self.settings, self.loop = settings, None
        self.listener = app.listen(settings)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        if settings.base_url.endswith(":0"):
            self.settings = app.msgspec.structs.replace(settings, base_url=self.url)
        self.database = settings.database_url
        self.app = app.create_app(self.settings)
        self.service = self.app.state.service
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "proxy_headers": False}
        config = uvicorn.Config(self.app, http=app.Protocol, ws="none", **quiet)
        self.ready = threading.Event()
        self.server = QuickServer(config, self)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        while not self.ready.wait(0.02):
            assert self.thread.is_alive(), "the service did not start"

    def run(self) -> None:
        with asyncio.Runner(loop_factory=self.make_loop) as runner:
            runner.run(self.main())

    async def main(self) -> None:
        if Running.judged:
            async with await app.connect(self.settings.database_url) as connection:
                await app.apply_schema(connection)
        else:
            await app.prepare(self.settings)
            Running.judged = True
        await self.server._serve(sockets=[self.listener])
        await hang_up_on_everybody()

    def make_loop(self) -> asyncio.AbstractEventLoop:
        self.loop = asyncio.new_event_loop()
        return self.loop

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine in the service's loop and give its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is claimed meanwhile."""
        claiming = self.service.worker.claiming
        self.call(claiming.acquire())
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(claiming.release)

    def stop(self) -> None:
        self.server.should_exit = True
        if self.thread.is_alive() and (ending := getattr(self.server, "ending", None)):
            self.loop.call_soon_threadsafe(ending.set)
        self.thread.join(DEADLINE)
        busy = (
            [str(task.get_stack()[-1:]) for task in asyncio.all_tasks(self.loop)]
            if self.thread.is_alive()
            else []
        )
        assert not self.thread.is_alive(), f"the service did not stop: {busy}"
        self.listener.close()


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start a service with settings of the test's choice; several may share the database."""
    running: list[Running] = []

    def start(**settings: Any) -> Running:
        environ = {
            "DATABASE_URL": database, "BELLHOP_HOME": str(tmp_path), "BELLHOP_SECRET": SECRET, "BELLHOP_PORT": "0",
            "BELLHOP_POOL_SIZE": "4",
        }  # fmt: skip
        environ |= {f"BELLHOP_{name.upper()}": str(value) for name, value in settings.items()}
        running.append(Running(app.load_settings(environ)))
        return running[-1]

    yield start
    for service in running:
        service.stop()


@pytest.fixture
def service(serve: Callable[..., Running]) -> Running:
    """The service as it is with default settings."""
    return serve()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    """A mail server that takes everything."""
    with running(Mailbox()) as peer:
        yield peer


@pytest.fixture
def hookbox() -> Iterator[Hookbox]:
    """A webhook receiver that takes everything."""
    with running(Hookbox()) as peer:
        yield peer


@pytest.fixture
def pushbox() -> Iterator[Pushbox]:
    """A push service that takes what is signed and encrypted well."""
    with running(Pushbox()) as peer:
        yield peer


@pytest.fixture
def delivering(serve: Callable[..., Running], mailbox: Mailbox) -> Callable[..., Running]:
    """Start a service that sends to the peers and looks for work all the time."""

    def start(**settings: Any) -> Running:
        usual = {
            "smtp_url": mailbox.url, "mail_from": "Bellhop <bell@example.org>", "outbound_allow": "127.0.0.0/8",
            "poll_seconds": 0.05, "channel_timeout_seconds": 5, "lease_seconds": 60, "email_per_minute": 0,
        }  # fmt: skip
        return serve(**usual | settings)

    return start


@pytest.fixture
def drain(sql: Callable[..., Any]) -> Callable[[], None]:
    """Wait until nothing is due and nothing is under way."""

    def wait() -> None:
        eventually(lambda: sql(NOTHING_DUE)[0][0])

    return wait


NOTHING_DUE = """
    SELECT NOT EXISTS (
        SELECT FROM outbox o LEFT JOIN breakers b USING (provider)
        WHERE o.state = 'sending'
           OR o.state IN ('open', 'pending') AND o.available_at <= now() AND coalesce(b.paused_until <= now(), true))
    AND NOT EXISTS (SELECT FROM intake WHERE error IS NULL AND due_at <= now())"""


@pytest.fixture
def make_key(sql: Callable[..., Any]) -> Callable[[str], str]:
    """A new API key of a scope."""

    def make(scope: str) -> str:
        key = f"bh_{scope}-{os.urandom(8).hex()}"
        digest = hashlib.sha256(key.encode()).digest()
        sql("INSERT INTO api_keys (name, scope, hash) VALUES (%s, %s, %s)", scope, scope, digest)
        return key

    return make


@pytest.fixture
def client() -> Iterator[Callable[..., httpx.Client]]:
    """HTTP clients that are closed at the end; `proof` is a bearer token or an API key."""
    clients: list[httpx.Client] = []

    def make(url: str, proof: str | None = None, **headers: str) -> httpx.Client:
        if proof:
            headers["Authorization"] = f"Bearer {proof}"
        clients.append(httpx.Client(base_url=url, headers=headers, timeout=DEADLINE, trust_env=False))
        return clients[-1]

    yield make
    for one in clients:
        one.close()


def user_token(user_id: str) -> str:
    return app.make_token(SECRET, user_id, app.timedelta(minutes=10))


@pytest.fixture
def api(
    service: Running, client: Callable[..., httpx.Client], make_key: Callable[[str], str]
) -> httpx.Client:
    """A program with an admin key."""
    return client(service.url, make_key("admin"))


@pytest.fixture
def sender(
    service: Running, client: Callable[..., httpx.Client], make_key: Callable[[str], str]
) -> httpx.Client:
    """A program with a send key."""
    return client(service.url, make_key("send"))


@pytest.fixture
def alice(service: Running, client: Callable[..., httpx.Client]) -> httpx.Client:
    return client(service.url, user_token("alice"))


@pytest.fixture
def bob(service: Running, client: Callable[..., httpx.Client]) -> httpx.Client:
    return client(service.url, user_token("bob"))


@pytest.fixture
def post(api: httpx.Client) -> Callable[..., dict[str, Any]]:
    """Send a notification to a user and give it back."""

    def send(user_id: str = "alice", **fields: Any) -> dict[str, Any]:
        usual = {
            "event_name": "comment.created",
            "title": "A comment",
            "body": MARKER,
            "data": {"inside": MARKER},
        }
        reply = api.post("/api/notifications", json={"user_id": user_id} | usual | fields)
        assert reply.status_code in (200, 201), reply.text
        return reply.json()["notification"]

    return send


@pytest.fixture(autouse=True)
def no_body_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does; what the peers hear is checked when they close."""
    yield
    assert MARKER not in caplog.text


@pytest.fixture
def reach(api: httpx.Client) -> Callable[..., None]:
    """Say how a user is reached: contact and preferences, as the API names them."""

    def set_up(user_id: str = "alice", **choices: Any) -> None:
        contact = {name: choices.pop(name) for name in ("email", "timezone", "locale") if name in choices}
        if contact:
            assert api.put(f"/api/users/{user_id}", json=contact).status_code == 200
        reply = api.patch(f"/api/users/{user_id}/preferences", json=choices)
        assert reply.status_code == 200, reply.text

    return set_up


@pytest.fixture
def sign_in(service: Running) -> Callable[..., str]:
    """The value of a session cookie for a user."""

    def session(user_id: str, admin: bool = False) -> str:
        gate = service.service.gate
        claims = {"admin": True} if admin else {}
        return gate.start_session(app.make_token(LINK_KEY, user_id, app.timedelta(minutes=5), **claims))

    return session


@pytest.fixture
def contents(sql: Callable[..., Any]) -> Callable[[], dict[str, list[str]]]:
    """Everything that is stored, to compare before and after; a key's last use is no change."""

    def look() -> dict[str, list[str]]:
        tables = [name for (name,) in sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        rows = {
            table: sql(f"SELECT t::text FROM {table} t ORDER BY 1") for table in tables if table != "api_keys"
        }
        return {table: [text for (text,) in found] for table, found in rows.items()}

    return look


def browser(endpoint: str) -> dict[str, Any]:
    """A browser's push subscription; the keys are those of RFC 8291's example."""
    p256dh = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
    return {"endpoint": endpoint, "keys": {"p256dh": p256dh, "auth": "BTBZMqHH6r4Tts7J_aSIgg"}}


def problem(reply: httpx.Response, status: int, field: str | None = None) -> dict[str, Any]:
    """An error of the one shape, with this status and about this field; gives it back."""
    assert reply.status_code == status, f"{reply.status_code}: {reply.text[:500]}"
    assert reply.headers["content-type"].startswith("application/problem+json")
    told = reply.json()
    assert told["type"] == "about:blank" and told["status"] == status and told["title"] and told["detail"]
    assert told["code"] == told["code"].lower() and " " not in told["code"]
    assert told.keys() <= {"type", "title", "status", "detail", "code", "errors"}
    if field is not None:
        assert [error["field"] for error in told["errors"]] == [field], told
        assert told["errors"][0]["message"]
    return told


def took(do: Callable[[], Any], times: int = 5) -> float:
    """The median time of a call: a moment in which the machine was busy does not count."""
    seconds = list[float]()
    for _ in range(times):
        began = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def eventually(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """Wait until the condition holds and give its value; it must hold in the end."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.02)
    return value
