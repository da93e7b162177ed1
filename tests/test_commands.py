"""The commands: real processes and what they print, beside a running service and without one."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import Running, eventually
from peers import HANG, Mailbox

import app

Sql = Callable[..., list[tuple[Any, ...]]]
PROGRAM = [sys.executable, "-W", "error", str(Path(app.__file__))]
SECRET = "a secret that is only good for tests, 32 bytes or more"


def environment(**settings: str) -> dict[str, str]:
    """This process's environment with nothing of Bellhop's but these settings."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("BELLHOP_", "DATABASE_URL"))
    }
    named = {"DATABASE_URL" if name == "database_url" else f"BELLHOP_{name.upper()}": value
             for name, value in settings.items()}  # fmt: skip
    return kept | named


class Served:
    """A service in a process of its own; `said` is what it has printed so far."""

    def __init__(self, **settings: str) -> None:
        self.said: list[str] = []
        self.complained: list[str] = []
        self.process = subprocess.Popen(
            PROGRAM,
            env=environment(port="0", **settings),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.readers = [
            threading.Thread(target=self.read, args=(pipe, lines))
            for pipe, lines in ((self.process.stdout, self.said), (self.process.stderr, self.complained))
        ]
        for reader in self.readers:
            reader.start()
        eventually(lambda: self.said or self.process.poll() is not None, 30)
        assert self.said, self.complained
        self.url = self.said[0].split()[-1]

    def read(self, pipe: Any, lines: list[str]) -> None:
        with pipe:
            lines.extend(iter(pipe.readline, ""))

    def kill(self) -> None:
        """Make sure that nothing of it is left."""
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join()

    def end(self, how: signal.Signals) -> float:
        """Send a signal and give the seconds until the process was gone."""
        started = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(15)
        return time.monotonic() - started


@pytest.fixture
def start() -> Iterator[Callable[..., Served]]:
    """Start services that are gone after the test."""
    running: list[Served] = []

    def begin(**settings: str) -> Served:
        running.append(Served(**settings))
        return running[-1]

    yield begin
    for one in running:
        one.kill()


@pytest.fixture
def bellhop(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process (a start of its own takes a second) and give code, output and complaint."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)

    def run(*command: str, **settings: str) -> tuple[int, str, str]:
        base = {"database_url": database, "home": str(tmp_path), "secret": SECRET}
        for name, value in environment(**base | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["bellhop", *command])
        code = 0
        try:
            app.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


# ─── serve ───


def test_serving_prints_one_line_when_it_answers_and_ends_when_told_also_with_open_streams(
    start: Callable[..., Served], database: str, tmp_path: Path
) -> None:
    for how in (signal.SIGTERM, signal.SIGINT):
        served = start(database_url=database, home=str(tmp_path), secret=SECRET, demo="true")
        assert re.fullmatch(r"bellhop: listening on http://127\.0\.0\.1:\d+\n", served.said[0])
        me = {"x-demo-user-id": "me"}
        with httpx.Client(base_url=served.url, headers=me, trust_env=False) as client:
            assert client.get("/health/ready").json() == {"status": "ok"}
            with client.stream("GET", "/api/stream") as stream:
                assert "inbox" in next(stream.iter_text())
                assert served.end(how) < 10
        assert served.process.returncode in (0, -how, 128 + how)
        time.sleep(0.1)
        assert len(served.said) == 1 and served.complained == []


def test_a_body_that_never_ends_and_a_mail_that_hangs_do_not_add_up_when_it_is_told_to_end(
    start: Callable[..., Served], mailbox: Mailbox, sql: Sql, database: str, tmp_path: Path
) -> None:
    mailbox.always("DATA", HANG)
    mail = {"smtp_url": mailbox.url, "mail_from": "bell@example.org"}
    served = start(database_url=database, home=str(tmp_path), secret=SECRET, demo="true", **mail)
    sql(
        "INSERT INTO notification_preferences (user_id, email, email_enabled) VALUES ('me', 'me@b.example', true)"
    )
    note = {"event_name": "e", "title": "t", "body": "b", "severity": "critical"}
    with httpx.Client(base_url=served.url, headers={"x-demo-user-id": "me"}, trust_env=False) as client:
        assert client.post("/api/notifications", json=note).status_code == 201
    eventually(lambda: sql("SELECT id FROM outbox WHERE state = 'sending'"))
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as half:
        half.sendall(b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        time.sleep(0.2)
        assert served.end(signal.SIGTERM) < 10
    assert sql("SELECT state, attempts FROM outbox") == [("pending", 0)], "it was given back"


def test_the_secret_of_a_home_makes_links_that_a_restarted_service_takes(
    start: Callable[..., Served], bellhop: Any, database: str, tmp_path: Path
) -> None:
    served = start(database_url=database, home=str(tmp_path))
    _, link, _ = bellhop("link", "alice", secret="", base_url=served.url)
    served.end(signal.SIGTERM)
    again = start(database_url=database, home=str(tmp_path))
    token = link.strip().partition("#token=")[2]
    with httpx.Client(base_url=again.url, trust_env=False) as client:
        assert client.post("/login", json={"token": token}).status_code == 200
        assert client.get("/api/unread-count").json() == {"unread_count": 0}


# ─── key ───


def test_a_key_is_printed_alone_and_works_at_once_beside_a_running_service(
    bellhop: Any, service: Running, sql: Sql
) -> None:
    for scope, status in ((None, 403), ("send", 403), ("admin", 200)):
        code, out, err = bellhop("key", "create", "shop", *(["--scope", scope] if scope else []))
        assert code == 0 and err == "" and re.fullmatch(r"bh_\S{40,}\n", out)
        proof = {"Authorization": f"Bearer {out.strip()}"}
        assert httpx.get(f"{service.url}/api/users/a", headers=proof, trust_env=False).status_code == 200
        assert httpx.get(f"{service.url}/api/keys", headers=proof, trust_env=False).status_code == status
    assert sql("SELECT name, scope FROM api_keys ORDER BY created_at") == [
        ("shop", "send"), ("shop", "send"), ("shop", "admin"),
    ]  # fmt: skip


def test_keys_are_listed_without_their_secrets_and_revoked_by_id(bellhop: Any, service: Running) -> None:
    secret = bellhop("key", "create", "my shop")[1].strip()
    proof = {"Authorization": f"Bearer {secret}"}
    assert httpx.get(f"{service.url}/api/users/a", headers=proof, trust_env=False).status_code == 200
    code, listed, _ = bellhop("key", "list")
    assert code == 0 and listed.count("\n") == 1
    assert "my shop" in listed and "send" in listed and secret not in listed and secret[3:] not in listed
    assert len(re.findall(r"\d{4}-\d\d-\d\d", listed)) == 2, "created and last used"
    key_id = re.search(r"[0-9a-f-]{36}", listed)
    assert key_id
    assert bellhop("key", "revoke", key_id[0])[0] == 0
    assert bellhop("key", "list")[1] == ""
    eventually(lambda: httpx.get(f"{service.url}/api/users/a", headers=proof).status_code == 401, 2)
    for wrong in (key_id[0], str(uuid4())):
        code, out, err = bellhop("key", "revoke", wrong)
        assert (code, out) == (1, "") and err.count("\n") == 1
    assert bellhop("key", "revoke", "x")[0] == 2


def test_a_key_needs_a_name_and_a_known_scope(bellhop: Any, sql: Sql) -> None:
    for wrong in (
        ["create"],
        ["create", "x", "--scope", "root"],
        ["delete"],
        [],
        ["create", ""],
        ["create", "x" * 101],
        ["create", "two\nlines"],
        ["create", "\udcff"],
    ):
        code, out, err = bellhop("key", *wrong)
        assert code in (1, 2) and out == "" and err
    assert sql("SELECT count(*) FROM api_keys") == [(0,)]


# ─── link ───


def test_a_link_is_printed_alone_and_signs_in(bellhop: Any, service: Running) -> None:
    code, out, err = bellhop("link", "zoë", base_url="https://bell.example")
    assert code == 0 and err == "" and re.fullmatch(r"https://bell\.example/login#token=\S+\n", out)
    for options, status in (([], 403), (["--admin"], 200), (["--minutes", "1"], 403)):
        _, out, _ = bellhop("link", "zoë", *options)
        token = out.strip().partition("#token=")[2]
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            assert client.post("/login", json={"token": token}).status_code == 200
            assert client.get("/api/keys").status_code == status
    assert bellhop("link", "a", "--minutes", "soon")[0] == 2


def test_a_link_for_nobody_or_no_time_is_refused(bellhop: Any) -> None:
    for wrong in (
        [""],
        ["x" * 201],
        ["a", "--minutes", "0"],
        ["a", "--minutes", "-5"],
        ["a", "--minutes", "9" * 20],
    ):
        code, out, err = bellhop("link", *wrong)
        assert code in (1, 2) and out == "" and err.count("\n") == 1
    assert bellhop("link")[0] == 2


# ─── send ───


@pytest.fixture
def tell(
    bellhop: Any, service: Running, make_key: Callable[[str], str]
) -> Callable[..., tuple[int, str, str]]:
    key = make_key("send")
    return lambda *command: bellhop("send", *command, url=service.url, api_key=key)


def test_sending_prints_the_id(tell: Any, alice: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = tell("alice", "Backup done")
    assert code == 0 and err == ""
    (note,) = alice.get("/api/notifications").json()["notifications"]
    assert out == f"{note['id']}\n" and note["title"] == "Backup done" and note["severity"] == "info"
    monkeypatch.setattr("sys.stdin", io.StringIO("line one\nline ünö\n"))
    full = [
        "--severity",
        "warning",
        "--event",
        "backup.done",
        "--url",
        "/logs",
        "--batch-key",
        "b",
        "--key",
        "k",
    ]
    first = tell("alice", "Backup", "--body", "-", *full)
    again = tell("alice", "Backup", "--body", "-", *full)
    assert first[0] == again[0] == 0 and first[1] == again[1]
    note = alice.get(f"/api/notifications/{first[1].strip()}").json()["notification"]
    expected = {
        "body": "line one\nline ünö\n", "severity": "warning", "event_name": "backup.done",
        "target_url": "/logs", "batch_key": "b", "idempotency_key": "k",
    }  # fmt: skip
    assert {name: note[name] for name in expected} == expected


def test_sending_for_later_prints_the_id_that_cancels(tell: Any, sql: Sql, sender: httpx.Client) -> None:
    code, out, _ = tell("alice", "Later", "--at", "2100-01-01T00:00:00+00:00")
    assert code == 0 and sql("SELECT count(*) FROM notifications") == [(0,)]
    assert sender.delete(f"/api/scheduled/{out.strip()}").status_code == 204


def test_what_cannot_be_sent_ends_with_1_and_says_why(
    tell: Any, bellhop: Any, service: Running, sql: Sql, make_key: Callable[[str], str]
) -> None:
    for wrong, word in (
        (["alice", "x", "--severity", "fatal"], "severity"), (["alice", "x" * 201], "title"),
        (["alice", "x", "--url", "javascript:x"], "target_url"),
        (["alice", "x", "--at", "noon"], "deliver_at"), (["", "x"], "user_id"), (["alice", ""], "title"),
    ):  # fmt: skip
        code, out, err = tell(*wrong)
        assert code == 1 and out == "" and err.count("\n") == 1 and word in err, (wrong, err)
    for settings, word in (
        ({"url": service.url}, "BELLHOP_API_KEY"), ({"url": service.url, "api_key": "bh_wrong"}, "401"),
        ({"url": "http://127.0.0.1:9", "api_key": make_key("send")}, "127.0.0.1:9"),
        ({"url": "nonsense", "api_key": make_key("send")}, "nonsense"),
    ):  # fmt: skip
        code, out, err = bellhop("send", "alice", "x", **({"api_key": ""} | settings))
        assert code == 1 and out == "" and err.count("\n") == 1 and word in err, err
        assert "bh_" not in err
    assert sql("SELECT count(*) FROM notifications") == [(0,)]


# ─── check ───


def test_check_is_content_or_prints_a_line_for_each_fault(bellhop: Any, sql: Sql) -> None:
    code, out, err = bellhop("check")
    assert code == 0 and err == "" and out.count("\n") <= 1
    sql("ALTER TABLE outbox RENAME COLUMN claim_seq TO gone")
    sql("ALTER TABLE api_keys RENAME COLUMN hash TO gone")
    code, out, err = bellhop("check")
    assert code == 1 and out == "" and err.count("\n") >= 2
    for line in err.splitlines():
        assert "claim_seq" in line or "hash" in line, line
    assert "create_api_key" in err and "get_api_key" in err


def test_a_database_that_goes_away_meanwhile_is_one_line(
    bellhop: Any, sql: Sql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of another command does which had started it and ends; here a plan ends its own connection."""
    sql("CREATE FUNCTION go_away() RETURNS boolean IMMUTABLE LANGUAGE sql"
        " AS 'SELECT pg_terminate_backend(pg_backend_pid())'")  # fmt: skip
    (tmp_path / "away.sql").write_text("SELECT go_away()")
    monkeypatch.setitem(app.QUERIES, "away", app.Query(tmp_path / "away.sql"))
    try:
        code, out, err = bellhop("key", "list")
    finally:
        sql("DROP FUNCTION go_away")
    assert (code, out, err.count("\n")) == (2, "", 1) and "the database went away" in err


def test_an_unknown_command_ends_with_2(bellhop: Any) -> None:
    code, out, err = bellhop("frobnicate")
    assert code == 2 and out == "" and "frobnicate" in err
    assert bellhop("--help")[0] == 0


# ─── The first run, with a database of its own ───


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that any account may enter, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="bh-"))
    folder.chmod(0o755)
    yield folder / "home"
    for pid in postgres_below(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)


def postgres_below(folder: Path) -> list[int]:
    """PostgreSQL processes whose data lies below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "comm").read_text()
            if words.startswith("postgres") and str(folder) in str((process / "cwd").readlink()):
                found.append(int(process.name))
    return found


def ids_of(url: str, key: str) -> set[str]:
    """The ids in the inbox of `me`."""
    proof = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=proof, trust_env=False) as client:
        document = client.get("/api/users/me/export").json()
    return {note["id"] for note in document["notifications"]}


def test_the_first_run_shows_the_way_and_nothing_acknowledged_is_ever_lost(
    start: Callable[..., Served], bellhop: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = environment(home=str(home), smtp_url="smtp://mail.example.com:port", mail_from="a@example.com")
    assert subprocess.run(PROGRAM, env=wrong, capture_output=True, timeout=60).returncode == 2
    # A start that was refused has not used up the only showing of the key.
    first = start(home=str(home))
    eventually(lambda: any("#token=" in line for line in first.said))
    printed = "".join(first.said)
    key = re.search(r"bh_[\w-]+", printed)
    curl = next(line.strip() for line in first.said if line.strip().startswith("curl "))
    link = re.search(r"http\S+/login#token=(\S+)", printed)
    assert key and link and "first-run" in printed
    assert link[0].startswith(first.url + "/"), "whatever port was free"

    pasted = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=20)
    told = json.loads(pasted.stdout)
    assert told["notification"]["user_id"] == "me" and told["notification"]["inserted"] is True
    with httpx.Client(base_url=first.url, trust_env=False) as me:
        assert me.post("/login", json={"token": link[1]}).status_code == 200
        assert me.get("/api/unread-count").json() == {"unread_count": 1}
        assert told["notification"]["title"] in me.get("/").text

    # Commands beside the running service share its database.
    beside = {"database_url": "", "home": str(home), "secret": "", "base_url": first.url}
    assert bellhop("key", "list", **beside)[1].count("first-run") == 1
    made = bellhop("key", "create", "second", **beside)[1].strip()
    sent = bellhop("send", "me", "From the shell", **beside, url=first.url, api_key=made)
    assert sent[0] == 0
    assert bellhop("check", **beside)[0] == 0
    token = bellhop("link", "me", **beside)[1].strip().partition("#token=")[2]
    with httpx.Client(base_url=first.url, trust_env=False) as me:
        assert me.post("/login", json={"token": token}).status_code == 200
    known = {told["notification"]["id"], sent[1].strip()}
    assert ids_of(first.url, key[0]) == known
    assert first.end(signal.SIGTERM) < 10
    assert postgres_below(home) == []

    # A second start keeps everything, and shows no secret again; kill -9 takes nothing that was acknowledged.
    second = start(home=str(home))
    time.sleep(0.2)
    assert len(second.said) == 1
    assert ids_of(second.url, key[0]) == known
    killing = threading.Timer(1, second.process.kill)
    killing.start()
    with httpx.Client(
        base_url=second.url, headers={"Authorization": f"Bearer {made}"}, trust_env=False
    ) as client:
        body = {"user_id": "me", "event_name": "e", "title": "t", "body": "b"}
        with contextlib.suppress(httpx.TransportError):
            while True:
                reply = client.post("/api/notifications", json=body)
                if reply.status_code == 201:
                    known.add(reply.json()["notification"]["id"])
    assert len(known) > 20
    eventually(lambda: postgres_below(home) == [], 10)
    third = start(home=str(home))
    assert known <= ids_of(third.url, made)
    assert third.end(signal.SIGINT) < 10
    assert postgres_below(home) == []


def test_a_home_in_use_is_refused_to_a_second_service(start: Callable[..., Served], home: Path) -> None:
    start(home=str(home))
    done = subprocess.run(
        PROGRAM, env=environment(home=str(home), port="0"), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert str(home) in done.stderr
