"""Webhooks, and the guard of everything that is posted: signed, bounded, and nowhere inside."""

import asyncio
import base64
import ipaddress
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from peers import (
    DROP,
    ENDLESS,
    HANG,
    NOON,
    Hookbox,
    deliver,
    line,
    outbound_settings,
    outgoing,
    running,
)  # fmt: skip
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

import app

OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLASw"
NEW = "whsec_" + "C2FVsBQIhrscChlQIMV+b5sSYspob7oDazfgkQ=="


def hook(url: str, *lines: app.Line, secrets: list[str] | None = None, **changes: Any) -> app.Outgoing:
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets or [NEW]]
    secret = outbound_settings(Path()).secret
    sealed = [base64.b64encode(app.new_webhook_secret(secret, key)[1]).decode() for key in keys]
    return outgoing("webhook", {"url": url, "sealed": [*sealed, None]}, *lines, **changes)


# ─── The address that is connected to ───

INSIDE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::10.0.0.1",
    "fe80::1", "fe80::1%lo", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "100::1",
    "2001:db8::1", "2001:2::1", "2001:10::1", "64:ff9b:1::a00:1", "4000::1", "5f00::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:224.0.0.1", "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:0:808:808:0:0:f5ff:fffe",
]  # fmt: skip
OUTSIDE = [
    "8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8", "2002:808:808::1", "2001:0:4136:e378:8000:63bf:f7f7:f7f7",
]  # fmt: skip


def allowed(address: str, *networks: str, plain: bool = False) -> bool:
    """Whether a socket for the address is given out."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    place = (address, 443, 0, 0) if ":" in address else (address, 443)
    allow = [ipaddress.ip_network(network) for network in networks]
    try:
        app.guarded_socket(allow, plain, (family, socket.SOCK_STREAM, 6, "", place)).close()
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_refused(address: str) -> None:
    assert not allowed(address)
    assert not allowed(address, "9.9.9.9/32", "2001:db8:9::/48")


def test_an_endless_answer_is_read_in_small_pieces() -> None:
    """A buffer of the usual size, always full, would keep the loop parsing for seconds."""
    options = socket.SOL_SOCKET, socket.SO_RCVBUF
    with socket.socket() as usual, app.guarded_socket([], False, (2, 1, 6, "", ("8.8.8.8", 443))) as guarded:
        assert guarded.getsockopt(*options) <= 4 * app.RECEIVE_BYTES < usual.getsockopt(*options)


@pytest.mark.parametrize("address", OUTSIDE)
def test_a_public_address_is_allowed_but_not_in_plain_text(address: str) -> None:
    assert allowed(address)
    assert not allowed(address, plain=True)
    assert not allowed(address, "10.0.0.0/8", plain=True)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.1.2.3", "10.0.0.0/8"),
        ("::1", "::1/128"),
        ("fd00::7", "fd00::/8"),
        ("::ffff:10.1.2.3", "10.0.0.0/8"),
        ("64:ff9b::10.1.2.3", "10.0.0.0/8"),
        ("8.8.8.8", "8.8.8.0/24"),
    ],
)
def test_an_address_on_the_list_is_allowed_even_in_plain_text(address: str, network: str) -> None:
    assert allowed(address, network)
    assert allowed(address, network, plain=True)


def test_what_is_refused_is_never_connected_to(hookbox: Hookbox, tmp_path: Path) -> None:
    closed = outbound_settings(tmp_path, outbound_allow=[])
    named = hookbox.url.replace("127.0.0.1", "localhost")
    urls = [hookbox.url, named, named.replace("http:", "https:"), hookbox.url.replace("http:", "https:")]
    for outcome in deliver(closed, *[hook(url) for url in urls]):
        assert outcome.verdict == "refused"
        assert "not public" in outcome.error
    assert not hookbox.requests


def test_plain_http_to_a_public_address_is_refused(tmp_path: Path) -> None:
    [outcome] = deliver(outbound_settings(tmp_path), hook("http://192.88.99.77/"))
    assert outcome.verdict == "refused"
    assert "http://" in outcome.error


def test_a_name_that_changes_its_mind_gains_nothing(
    hookbox: Hookbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Iterator[str] = iter(["10.9.9.9", "127.0.0.1", "127.0.0.1"])

    async def resolve(self: Any, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        address = next(answers)
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET,
                "proto": 6,
                "flags": 0,
            }
        ]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    config = outbound_settings(tmp_path, outbound_allow=[])
    url = f"https://rebinding.example:{hookbox.port}/"
    assert [outcome.verdict for outcome in deliver(config, hook(url))] == ["refused"]
    assert [outcome.verdict for outcome in deliver(config, hook(url))] == ["refused"]
    assert not hookbox.requests


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/", "file:///etc/passwd", "example.org", "", "https://", "http:///x",
        "https://[::1", "//example.org", "https://user:pass@example.org/", "https://user@example.org/",
        "http://2130706433/", "http://127.1/", "http://0x7f.1/", "http://0177.0.0.1/", "gopher://127.0.0.1/",
        "http://127.0.0.1:99999/",
    ],
)  # fmt: skip
def test_what_is_no_plain_web_address_is_refused(url: str, tmp_path: Path) -> None:
    [outcome] = deliver(outbound_settings(tmp_path, outbound_allow=[]), hook(url))
    assert outcome.verdict == "refused", outcome
    assert outcome.error


def test_a_redirect_is_not_followed(hookbox: Hookbox, tmp_path: Path) -> None:
    for status in (301, 302, 303, 307, 308):
        hookbox.script("/hook", (status, {"Location": f"{hookbox.url}/elsewhere"}))
        [outcome] = deliver(outbound_settings(tmp_path), hook(f"{hookbox.url}/hook"))
        assert outcome.verdict == "refused"
        assert outcome.error.startswith(str(status))
    assert {hit.path for hit in hookbox.requests} == {"/hook"}


def test_proxies_of_the_environment_are_not_asked(
    hookbox: Hookbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert deliver(outbound_settings(tmp_path), hook(hookbox.url))[0].verdict == "sent"


def test_a_certificate_nobody_trusts_is_a_fault(tmp_path: Path) -> None:
    with running(Hookbox(tls=True)) as hookbox:
        [outcome] = deliver(outbound_settings(tmp_path), hook(hookbox.url))
        assert outcome.verdict == "fault"
        assert not hookbox.requests


# ─── What comes back ───


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (200, "sent"), (201, "sent"), (204, "sent"), (400, "refused"), (401, "refused"), (403, "refused"),
        (404, "refused"), (413, "refused"), (422, "refused"), (410, "gone"), (408, "retry"), (425, "retry"),
        (429, "retry"), (500, "retry"), (502, "retry"), (503, "retry"), (504, "retry"), (DROP, "retry"),
        (HANG, "retry"),
    ],
)  # fmt: skip
def test_the_answer_decides(hookbox: Hookbox, tmp_path: Path, answer: Any, verdict: str) -> None:
    hookbox.script("/hook", answer)
    config = outbound_settings(tmp_path, channel_timeout_seconds=1.5)
    started = time.monotonic()
    [outcome] = deliver(config, hook(f"{hookbox.url}/hook"))
    assert outcome.verdict == verdict
    assert time.monotonic() - started < 2 * config.channel_timeout_seconds
    assert len(hookbox.requests) == 1


def test_a_receiver_that_is_not_there_is_a_fault(hookbox: Hookbox, tmp_path: Path) -> None:
    hookbox.down()
    config = outbound_settings(tmp_path)
    for url in (f"{hookbox.url}/secret-path", "https://nowhere.invalid/secret-path"):
        [outcome] = deliver(config, hook(url))
        assert outcome.verdict == "fault"
        assert "secret-path" not in outcome.error


def test_the_first_words_of_an_error_are_kept(hookbox: Hookbox, tmp_path: Path) -> None:
    hookbox.script("/hook", (500, {}, "database\r\nis \x1b[31maway " + "x" * 5000))
    [outcome] = deliver(outbound_settings(tmp_path), hook(f"{hookbox.url}/hook"))
    assert outcome.error.startswith("500 database is  [31maway xxx")
    assert len(outcome.error) == 200


def test_an_answer_without_end_is_cut_off(hookbox: Hookbox, tmp_path: Path) -> None:
    hookbox.script("/hook", ENDLESS, ENDLESS)
    started = time.monotonic()
    outcomes = deliver(outbound_settings(tmp_path), *[hook(f"{hookbox.url}/hook")] * 2)
    assert [outcome.verdict for outcome in outcomes] == ["retry", "retry"]
    assert time.monotonic() - started < 2
    time.sleep(0.2)
    sent = hookbox.endless_bytes
    time.sleep(0.2)
    assert hookbox.endless_bytes == sent, "somebody still listens"


def test_a_long_answer_to_a_success_is_not_waited_for(hookbox: Hookbox, tmp_path: Path) -> None:
    hookbox.script("/hook", (200, {}, "x" * 20_000_000))
    started = time.monotonic()
    assert deliver(outbound_settings(tmp_path), hook(f"{hookbox.url}/hook"))[0].verdict == "sent"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0), ("0", 0.0), ("86400", 86_400.0), ("999999999999999999999", 86_400.0), ("-5", None),
        ("", None), ("soon", None), ("1.5", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 01 Jan 99999 00:00:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after_is_honoured_up_to_a_day(header: str, seconds: float | None) -> None:
    assert app.retry_after(header) == seconds


@pytest.fixture
def new_york() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("new_york")
def test_retry_after_is_in_gmt_wherever_we_are() -> None:
    later = datetime.now(UTC) + timedelta(minutes=2)
    east = later.astimezone(timezone(timedelta(hours=2)))
    assert app.retry_after(east.strftime("%a, %d %b %Y %H:%M:%S %z")) == pytest.approx(120, abs=3)
    for form in ("%a, %d %b %Y %H:%M:%S GMT", "%a, %d %b %Y %H:%M:%S -0000", "%a %b %d %H:%M:%S %Y"):
        assert app.retry_after(later.strftime(form)) == pytest.approx(120, abs=3)


def test_retry_after_may_be_a_date(hookbox: Hookbox, tmp_path: Path) -> None:
    for later, expected in [(timedelta(minutes=2), 120), (timedelta(days=9), 86_400)]:
        hookbox.script(
            "/hook", (503, {"Retry-After": format_datetime(datetime.now(UTC) + later, usegmt=True)})
        )
        [outcome] = deliver(outbound_settings(tmp_path), hook(f"{hookbox.url}/hook"))
        assert outcome.retry_after == pytest.approx(expected, abs=3)


def test_cookies_are_not_kept(hookbox: Hookbox, tmp_path: Path) -> None:
    hookbox.script("/hook", (200, {"Set-Cookie": "spy=1; Path=/"}))
    deliver(outbound_settings(tmp_path), *[hook(f"{hookbox.url}/hook")] * 2)
    assert "Cookie" not in hookbox.requests[1].headers


def test_a_host_that_hangs_delays_nobody_else(hookbox: Hookbox, tmp_path: Path) -> None:
    hookbox.always("/hook", HANG)

    async def work() -> None:
        outbound = app.Outbound(outbound_settings(tmp_path, channel_timeout_seconds=25))
        await outbound.open()
        stuck = [asyncio.create_task(outbound.send(hook(f"{hookbox.url}/hook"))) for _ in range(200)]
        await asyncio.to_thread(hookbox.wait, 8)
        with running(await asyncio.to_thread(Hookbox)) as other:
            assert (await outbound.send(hook(other.url))).verdict == "sent"
            assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        await outbound.close()

    asyncio.run(work())
    assert len(hookbox.requests) == 8, "one host may hold eight connections"


# ─── What a webhook says ───


def test_a_webhook_says_this_and_no_more(hookbox: Hookbox, tmp_path: Path) -> None:
    item = line("Invoice 42 is overdue", created_at=NOON.replace(minute=7))
    message = hook(f"{hookbox.url}/hook?team=7", item, user_id="älice")
    assert deliver(outbound_settings(tmp_path), message) == [app.Outcome("sent")]
    [hit] = hookbox.requests
    assert (hit.method, hit.path) == ("POST", "/hook?team=7")
    assert hit.headers["Content-Type"] == "application/json"
    assert hit.headers["webhook-id"] == str(message.id)
    assert hit.json == {
        "type": "notification.created",
        "timestamp": "2026-03-04T12:00:00Z",
        "data": {
            "id": str(item.id),
            "user_id": "älice",
            "event_name": "invoice.overdue",
            "severity": "warning",
            "summary": "Invoice 42 is overdue",
            "url": f"https://bell.example.org/n/{item.id}",
            "created_at": "2026-03-04T12:07:00Z",
        },
    }


def test_a_private_item_is_only_announced(hookbox: Hookbox, tmp_path: Path) -> None:
    deliver(outbound_settings(tmp_path), hook(hookbox.url, line(None), locale="fr"))
    assert hookbox.requests[0].json["data"]["summary"] == "Vous avez une nouvelle notification"


def test_a_ping_is_a_ping(hookbox: Hookbox, tmp_path: Path) -> None:
    deliver(outbound_settings(tmp_path), hook(hookbox.url, event_name="bellhop.ping"))
    assert hookbox.requests[0].json == {"type": "ping", "timestamp": "2026-03-04T12:00:00Z", "data": {}}
    Webhook(NEW).verify(hookbox.requests[0].body, dict(hookbox.requests[0].headers))


def test_each_secret_that_is_still_good_signs(hookbox: Hookbox, tmp_path: Path) -> None:
    deliver(outbound_settings(tmp_path), hook(hookbox.url, line("Ünïcode 🧾"), secrets=[NEW, OLD]))
    [hit] = hookbox.requests
    assert len(hit.headers["webhook-signature"].split(" ")) == 2
    for secret in (NEW, OLD):
        assert Webhook(secret).verify(hit.body, dict(hit.headers))["type"] == "notification.created"
    for body, headers, secret in [
        (hit.body + b" ", {}, NEW),
        (hit.body, {"webhook-id": "another"}, NEW),
        (hit.body, {"webhook-timestamp": str(int(time.time()) - 3)}, NEW),
        (hit.body, {}, "whsec_" + "A" * 32),
    ]:
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, dict(hit.headers) | headers)


def test_a_retry_keeps_the_id_and_the_body(hookbox: Hookbox, tmp_path: Path) -> None:
    message, other = hook(f"{hookbox.url}/hook"), hook(f"{hookbox.url}/hook", id=uuid4())
    hookbox.script("/hook", 500)
    deliver(outbound_settings(tmp_path), message, message, other)
    first, second, third = hookbox.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"] != third.headers["webhook-id"]
    assert first.body == second.body
