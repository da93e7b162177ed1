"""The live stream under a crowd: clients that stop reading, clients that vanish. Both cost nobody else anything."""

import asyncio
import contextlib
import resource
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DEADLINE, Running, app, eventually, user_token

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() throws away what is unsent and answers with RST


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for a thousand connections and both their ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def request(user: str) -> bytes:
    return f"GET /api/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {user_token(user)}\r\n\r\n".encode()


def connect(service: Running, buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(DEADLINE)
    client.connect(("127.0.0.1", int(service.url.rpartition(":")[2])))
    return client


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def tasks(service: Running) -> int:
    return len(asyncio.all_tasks(service.loop))


# ── clients that vanish


@pytest.mark.parametrize("phase", ["before the request", "before the head", "after the first event"])
def test_a_thousand_clients_that_reset_at_once_leave_nothing_behind(
    service: Running, alice: httpx.Client, post: Any, many_files: None, phase: str
) -> None:
    hub = service.service.hub
    post("alice")
    files, busy = open_files(), tasks(service)
    clients = [connect(service) for _ in range(1_000)]
    for number, client in enumerate(clients):
        if phase != "before the request":
            client.sendall(request(f"user-{number}"))
        if phase == "after the first event":
            read_until(client, b"data: ")
    if phase == "after the first event":
        assert sum(map(len, hub.streams.values())) == 1_000
    for client in clients:
        reset(client)
    eventually(lambda: not hub.streams)
    eventually(lambda: open_files() <= files and tasks(service) <= busy)
    assert alice.get("/api/unread-count").json() == {"unread_count": 1}


def read_until(client: socket.socket, wanted: bytes) -> None:
    seen = b""
    while wanted not in seen:
        received = client.recv(65_536)
        assert received, "the service hung up"
        seen += received


# ── clients that stop reading

READERS, ROUNDS, POSTS = 500, 4, 150
USERS = [f"user-{number}" for number in range(READERS)]
NOTE = {"event_name": "a", "title": "b", "body": "c"}


def post_times(program: httpx.Client) -> list[float]:
    """How long each of some posts took, one after the other, each to a user who may be listening."""
    took = []
    for user in USERS[:POSTS]:
        began = time.perf_counter()
        assert program.post("/api/notifications", json=NOTE | {"user_id": user}).status_code == 201
        took.append(time.perf_counter() - began)
    return took


def stuck(service: Running) -> int:
    """How many connections wait until their client takes something."""
    return sum(one.flow.write_paused for one in list(service.server.server_state.connections))


def paths(service: Running) -> list[str]:
    """What the open connections asked for last."""
    return [one.scope["path"] for one in list(service.server.server_state.connections)]


async def clog(service: Running) -> None:
    """Fill what lies between the service and its clients, as a long silence of theirs would."""
    for connection in list(service.server.server_state.connections):
        if connection.scope["path"] == "/api/stream":
            connection.transport.set_write_buffer_limits(high=0)
            connection.transport.write(b":" * 32_768)


@contextlib.contextmanager
def sleepers(service: Running) -> Iterator[None]:
    """A stream for each user, whose client asks and then takes nothing."""
    hub, clients = service.service.hub, []
    for user in USERS:
        clients.append(connect(service, buffer=1))
        clients[-1].sendall(request(user))
    eventually(lambda: len(hub.streams) == READERS, 60)
    eventually(
        lambda: not any(stale.is_set() for one in list(hub.streams.values()) for stale in one.values())
    )
    time.sleep(0.2)
    service.call(clog(service))
    yield
    for client in clients:
        reset(client)
    eventually(lambda: not hub.streams, 60)


def test_a_client_that_stopped_reading_is_dropped_with_its_connection(
    service: Running, post: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "STREAM_SEND_SECONDS", 0.2)
    service.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    post("alice")
    busy = tasks(service)
    with connect(service, buffer=1) as client:
        client.sendall(request("alice"))
        eventually(lambda: service.service.hub.streams)
        time.sleep(0.2)
        service.call(clog(service))
        post("alice")
        eventually(lambda: not service.service.hub.streams)
        eventually(lambda: "/api/stream" not in paths(service) and tasks(service) <= busy)
    assert "without completing" not in caplog.text


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


@pytest.mark.campaign
def test_500_clients_that_stop_reading_do_not_slow_a_post(
    service: Running, sender: httpx.Client, many_files: None
) -> None:
    """In alternation, so that whatever else the machine does burdens both alike."""
    service.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    alone, crowded, waited = list[float](), list[float](), []
    post_times(sender)
    for _ in range(ROUNDS):
        alone += post_times(sender)
        with sleepers(service):
            waited.append(stuck(service))
            crowded += post_times(sender)
    print(f"p99 {p99(alone) * 1000:.1f} ms alone, {p99(crowded) * 1000:.1f} ms beside {min(waited)} clients that"
          f" are stuck, ratio {p99(crowded) / p99(alone):.2f}; medians {statistics.median(alone) * 1000:.1f}"
          f" and {statistics.median(crowded) * 1000:.1f} ms")  # fmt: skip
    assert min(waited) > READERS * 0.9
    assert p99(crowded) < 2 * p99(alone)
