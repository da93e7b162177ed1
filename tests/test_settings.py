"""A wrong setting, an unknown one or an unsafe combination ends the start: exit code 2 and one clear line."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import app

LONG = "a secret of thirty-two bytes or more"
Sql = Callable[..., list[tuple[Any, ...]]]
REFUSED: list[tuple[dict[str, str], str]] = [  # settings, and the variable that the line must name
    ({"BELLHOP_PROT": "8000"}, "BELLHOP_PROT"), ({"BELLHOP_": "x"}, "BELLHOP_"),
    ({"BELLHOP_port": "8000"}, "BELLHOP_port"), ({"BELLHOP_PORT_FILES": "x"}, "BELLHOP_PORT_FILES"),
    ({"BELLHOP_PORT": "eighty"}, "BELLHOP_PORT"), ({"BELLHOP_PORT": "65536"}, "BELLHOP_PORT"),
    ({"BELLHOP_PORT": "-1"}, "BELLHOP_PORT"), ({"BELLHOP_PORT": "80.5"}, "BELLHOP_PORT"),
    ({"BELLHOP_DEMO": "maybe"}, "BELLHOP_DEMO"),
    ({"BELLHOP_DEMO": "true", "BELLHOP_HOST": "0.0.0.0"}, "BELLHOP_DEMO"),
    ({"BELLHOP_DEMO": "true", "BELLHOP_HOST": "::"}, "BELLHOP_DEMO"),
    ({"BELLHOP_DEMO": "1", "BELLHOP_HOST": "192.168.1.5"}, "BELLHOP_DEMO"),
    ({"BELLHOP_DEMO": "true", "BELLHOP_HOST": "example.com"}, "BELLHOP_DEMO"),
    ({"BELLHOP_HOST": "no such host"}, "no such host"), ({"BELLHOP_HOST": "203.0.113.7"}, "203.0.113.7"),
    ({"BELLHOP_SECRET": "short"}, "BELLHOP_SECRET"),
    ({"BELLHOP_BASE_URL": "ftp://example.com"}, "BELLHOP_BASE_URL"),
    ({"BELLHOP_BASE_URL": "example.com"}, "BELLHOP_BASE_URL"),
    ({"BELLHOP_PROXY_USER_HEADER": "X-User"}, "BELLHOP_PROXY_ADDRESSES"),
    ({"BELLHOP_PROXY_ADDRESSES": "10.0.0.0/8"}, "BELLHOP_PROXY_USER_HEADER"),
    ({"BELLHOP_PROXY_USER_HEADER": "U", "BELLHOP_PROXY_ADDRESSES": "10.0.0.0/99"}, "BELLHOP_PROXY_ADDRESSES"),
    ({"BELLHOP_PROXY_USER_HEADER": "U", "BELLHOP_PROXY_ADDRESSES": "10.0.0.1/8"}, "BELLHOP_PROXY_ADDRESSES"),
    ({"BELLHOP_PROXY_USER_HEADER": "X User", "BELLHOP_PROXY_ADDRESSES": "::1"}, "BELLHOP_PROXY_USER_HEADER"),
    ({"BELLHOP_OUTBOUND_ALLOW": "intranet"}, "BELLHOP_OUTBOUND_ALLOW"),
    ({"BELLHOP_JWT_PUBLIC_KEY": "garbage"}, "BELLHOP_JWT_PUBLIC_KEY"),
    ({"BELLHOP_JWT_AUDIENCE": "bellhop"}, "BELLHOP_JWT_AUDIENCE"),
    ({"BELLHOP_LEASE_SECONDS": "49"}, "BELLHOP_LEASE_SECONDS"),
    ({"BELLHOP_CHANNEL_TIMEOUT_SECONDS": "31"}, "BELLHOP_LEASE_SECONDS"),
    ({"BELLHOP_CHANNEL_TIMEOUT_SECONDS": "0"}, "BELLHOP_CHANNEL_TIMEOUT_SECONDS"),
    ({"BELLHOP_RETRY_BASE_SECONDS": "3600"}, "BELLHOP_RETRY_MAX_SECONDS"),
    ({"BELLHOP_SMTP_URL": "smtp://mail.example.com"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_SMTP_URL": "mail.example.com", "BELLHOP_MAIL_FROM": "a@example.com"}, "BELLHOP_SMTP_URL"),
    ({"BELLHOP_SMTP_URL": "https://x", "BELLHOP_MAIL_FROM": "a@example.com"}, "BELLHOP_SMTP_URL"),
    ({"BELLHOP_MAIL_FROM": "nobody"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "a@example.com\nBcc: b@example.com"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "Acme, Inc. <bell@example.org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "[Acme] <bell@example.org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "Bell (prod <bell@example.org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "Bell <bell@example..org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": ".a. <.a.@example.org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "Bell\x0b <bell@example.org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": '"=?utf-8?q?a=0ABcc?=" <bell@example.org>'}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "ops@Acme <bell@example.org>"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_MAIL_FROM": "bell@bücher.example"}, "BELLHOP_MAIL_FROM"),
    ({"BELLHOP_VAPID_SUBJECT": "me"}, "BELLHOP_VAPID_SUBJECT"),
    ({"BELLHOP_VAPID_PRIVATE_KEY": "garbage"}, "BELLHOP_VAPID_PRIVATE_KEY"),
    ({"BELLHOP_DELIVERY_CONCURRENCY": "-1"}, "BELLHOP_DELIVERY_CONCURRENCY"),
    ({"BELLHOP_POLL_SECONDS": "0"}, "BELLHOP_POLL_SECONDS"),
    ({"BELLHOP_POLL_SECONDS": "nan"}, "BELLHOP_POLL_SECONDS"),
    ({"BELLHOP_LEASE_SECONDS": "inf"}, "BELLHOP_LEASE_SECONDS"),
    ({"BELLHOP_MAX_ATTEMPTS": "0"}, "BELLHOP_MAX_ATTEMPTS"),
    ({"BELLHOP_EMAIL_PER_MINUTE": "-1"}, "BELLHOP_EMAIL_PER_MINUTE"),
    ({"BELLHOP_RETENTION_DAYS": "-1"}, "BELLHOP_RETENTION_DAYS"),
    ({"BELLHOP_RETENTION_DAYS": "2000000000"}, "BELLHOP_RETENTION_DAYS"),
    ({"BELLHOP_DELIVERY_CONCURRENCY": "9999999999"}, "BELLHOP_DELIVERY_CONCURRENCY"),
    ({"BELLHOP_MAX_ATTEMPTS": "99999999999999"}, "BELLHOP_MAX_ATTEMPTS"),
    ({"BELLHOP_POOL_SIZE": "0"}, "BELLHOP_POOL_SIZE"),
    ({"BELLHOP_POOL_SIZE": "many"}, "BELLHOP_POOL_SIZE"),
    ({"BELLHOP_CORS_ORIGINS": "example.com"}, "BELLHOP_CORS_ORIGINS"),
    ({"BELLHOP_CORS_ORIGINS": "*"}, "BELLHOP_CORS_ORIGINS"),
    ({"BELLHOP_CORS_ORIGINS": "https://a.example/path"}, "BELLHOP_CORS_ORIGINS"),
    ({"BELLHOP_HOME": "/dev/null/x", "BELLHOP_SECRET": ""}, "BELLHOP_HOME"),
    ({"BELLHOP_SECRET_FILE": "/no/such/file"}, "BELLHOP_SECRET"),
    ({"DATABASE_URL": "not a connection string"}, "DATABASE_URL"),
    ({"DATABASE_URL": "mysql://root:sesame@127.0.0.1/x"}, "DATABASE_URL"),
    ({"BELLHOP_BASE_URL": "https://me:password@bell.example"}, "BELLHOP_BASE_URL"),
]  # fmt: skip


@pytest.fixture
def start(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the program with an environment that it must refuse, and give the line that it says."""

    def run(environ: dict[str, str], *command: str) -> str:
        for name in list(os.environ):
            if name.startswith(("BELLHOP_", "DATABASE_URL")):
                monkeypatch.delenv(name)
        base = {
            "DATABASE_URL": database,
            "BELLHOP_HOME": str(tmp_path),
            "BELLHOP_SECRET": LONG,
            "BELLHOP_PORT": "0",
        }
        for name, value in (base | environ).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["bellhop", *command])
        monkeypatch.setattr(app.Server, "run", lambda *_, **__: pytest.fail(f"it started with {environ}"))
        with pytest.raises(SystemExit) as ended:
            app.main()
        said = capsys.readouterr()
        assert ended.value.code == (1 if command == ("check",) else 2), said
        assert said.out == "" and said.err.count("\n") == 1, said
        assert "Traceback" not in said.err and "sesame" not in said.err
        return said.err

    return run


def test_what_is_wrong_unknown_or_unsafe_is_refused_in_one_line(start: Callable[..., str]) -> None:
    for environ, named in REFUSED:
        line = start(environ)
        assert named in line, (environ, line)


def test_every_command_refuses_what_serve_refuses(start: Callable[..., str]) -> None:
    for command in ("serve", "check", "link alice", "key list", "send alice hi"):
        assert "BELLHOP_PROT" in start({"BELLHOP_PROT": "1"}, *command.split())


def test_check_finds_what_serve_finds_only_in_its_parts(start: Callable[..., str]) -> None:
    mail = {"BELLHOP_MAIL_FROM": "a@example.com"}
    for environ in (
        mail | {"BELLHOP_SMTP_URL": "smtp://mail.example.com:port"},
        mail | {"BELLHOP_SMTP_URL": "smtp://mail.example.com?starttls=no"},
        {"BELLHOP_VAPID_PRIVATE_KEY": "-----BEGIN NONSENSE-----"},
    ):
        assert start(environ, "serve") == start(environ, "check")


def test_a_near_miss_is_told_its_right_name(start: Callable[..., str]) -> None:
    assert "BELLHOP_PORT" in start({"BELLHOP_PROT": "1"}).replace("BELLHOP_PROT", "")
    assert "BELLHOP_DEMO" in start({"BELLHOP_DEMOS": "1"}).replace("BELLHOP_DEMOS", "")


def test_a_curve_that_no_token_can_be_signed_with_is_refused(start: Callable[..., str]) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
    assert "BELLHOP_JWT_PUBLIC_KEY" in start({"BELLHOP_JWT_PUBLIC_KEY": pem})


def test_a_port_in_use_is_named(start: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in start({"BELLHOP_PORT": port})


def test_a_newer_database_is_refused(start: Callable[..., str], sql: Sql) -> None:
    sql("INSERT INTO schema_version (version) VALUES (999)")
    assert "newer" in start({})


def test_real_processes_end_with_2_and_one_line(tmp_path: Path) -> None:
    for environ, named in REFUSED[0], REFUSED[9], REFUSED[15]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BELLHOP_")}
        given = clean | {"DATABASE_URL": "postgresql:///x", "BELLHOP_HOME": str(tmp_path)} | environ
        program = Path(app.__file__)
        done = subprocess.run(
            [sys.executable, program], env=given, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        assert named in done.stderr


# ─── Values ───


def test_what_is_not_set_has_the_default_of_the_contract() -> None:
    settings = app.load_settings({})
    expected = {
        "host": "127.0.0.1", "port": 8000, "base_url": "http://127.0.0.1:8000", "demo": False,
        "jwt_public_key": "", "jwt_audience": "", "proxy_user_header": "", "delivery_concurrency": 16,
        "lease_seconds": 60, "poll_seconds": 1, "max_attempts": 5, "retry_base_seconds": 60,
        "retry_max_seconds": 1800, "email_per_minute": 5, "push_per_minute": 20, "webhook_per_minute": 60,
        "channel_timeout_seconds": 25, "smtp_url": "", "mail_from": "", "retention_days": 90,
        "pool_size": 10, "api_key": "",
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    assert not any(
        (settings.admins, settings.cors_origins, settings.outbound_allow, settings.proxy_addresses)
    )
    home = "/var/lib/bellhop" if os.geteuid() == 0 else str(Path("~/.local/share/bellhop").expanduser())
    assert settings.home == home
    assert app.load_settings({"BELLHOP_PORT": "", "BELLHOP_DEMO": ""}) == settings, "empty is not set"


def test_links_begin_with_the_base_url_or_with_where_it_listens() -> None:
    def base_url(**environ: str) -> str:
        return app.load_settings(
            {f"BELLHOP_{name.upper()}": value for name, value in environ.items()}
        ).base_url

    assert base_url(host="10.0.0.1", port="81") == "http://10.0.0.1:81"
    assert base_url(host="::1", port="81") == "http://[::1]:81"
    assert base_url(base_url="https://bell.example/") == "https://bell.example"
    assert base_url(base_url="https://bell.example/in/") == "https://bell.example/in"


def test_lists_are_split_at_commas() -> None:
    environ = {
        "BELLHOP_ADMINS": "alice, bob,,", "BELLHOP_CORS_ORIGINS": "https://a.example,http://localhost:3000",
        "BELLHOP_OUTBOUND_ALLOW": "10.0.0.0/8, fd00::/8",
    }  # fmt: skip
    settings = app.load_settings(environ)
    assert list(settings.admins) == ["alice", "bob"]
    assert list(settings.cors_origins) == ["https://a.example", "http://localhost:3000"]
    assert [str(network) for network in settings.outbound_allow] == ["10.0.0.0/8", "fd00::/8"]


def test_a_value_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{LONG}\n")
    (tmp_path / "port").write_text("81\n")
    settings = app.load_settings(
        {"BELLHOP_SECRET_FILE": str(tmp_path / "secret"), "BELLHOP_PORT_FILE": str(tmp_path / "port")}
    )
    assert settings.secret == LONG and settings.port == 81
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(app.StartError, match="BELLHOP_SECRET_FILE names an empty file"):
        app.load_settings({"BELLHOP_SECRET_FILE": str(tmp_path / "empty")})
    both = {"BELLHOP_SECRET": LONG, "BELLHOP_SECRET_FILE": str(tmp_path / "secret")}
    with pytest.raises(app.StartError, match="BELLHOP_SECRET"):
        app.load_settings(both)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(app.StartError, match="BELLHOP_SECRET"):
        app.load_settings({"BELLHOP_SECRET_FILE": str(tmp_path / "binary")})


def test_a_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    settings = app.load_settings({"BELLHOP_HOME": str(home)})
    first, second = app.keep_secret(settings).secret, app.keep_secret(settings).secret
    assert first == second and len(first) >= 32
    for path in home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_secret_that_was_cut_short_is_not_taken(tmp_path: Path) -> None:
    settings = app.load_settings({"BELLHOP_HOME": str(tmp_path)})
    whole = app.keep_secret(settings).secret
    for kept in ("", whole[:31]):
        (tmp_path / "secret").write_text(kept)
        with pytest.raises(app.StartError, match="cut short"):
            app.keep_secret(settings)
        assert (tmp_path / "secret").read_text() == kept, "whoever brings it back may want to look at it"
    (tmp_path / "secret").write_text(whole)
    assert app.keep_secret(settings).secret == whole


def test_a_first_start_twice_at_once_agrees_on_the_secret(tmp_path: Path) -> None:
    settings = app.load_settings({"BELLHOP_HOME": str(tmp_path)})
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: app.keep_secret(settings).secret, range(16)))
    assert len(set(made)) == 1


def test_the_service_speaks_utc_whatever_the_server_does(
    serve: Any, sql: Sql, client: Any, make_key: Any
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(serve().database)["dbname"]
    sql(f"ALTER DATABASE {name} SET timezone TO 'Asia/Tokyo'")
    one = client(serve().url, make_key("send"))
    body = {"user_id": "alice", "event_name": "e", "title": "t", "body": "b"}
    assert (
        one.post("/api/notifications", json=body)
        .json()["notification"]["created_at"]
        .endswith(("+00:00", "Z"))
    )
