"""What the first paint costs, measured as a ratio within one run."""

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

from conftest import DEADLINE, Running, app

TURNS = 300


class Visitor:
    """A browser's connection with nothing of its own that takes time."""

    def __init__(self, service: Running, session: str) -> None:
        port = int(service.url.rpartition(":")[2])
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.cookie = f"{app.COOKIE}={session}"

    def seconds(self, path: str) -> float:
        """How long a page takes from the request to its last byte."""
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {self.cookie}\r\n\r\n".encode()
        began = time.perf_counter()
        self.socket.sendall(request)
        head, _, body = self.receive().partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += self.receive()
        took = time.perf_counter() - began
        assert head.startswith(b"HTTP/1.1 200"), head
        return took

    def receive(self) -> bytes:
        received = self.socket.recv(262_144)
        assert received, "the service hung up"
        return received


def test_the_first_paint_of_30_costs_the_server_at_most_twice_the_list(
    service: Running, post: Callable[..., dict[str, Any]], sign_in: Callable[..., str]
) -> None:
    for number in range(30):
        post(title=f"Mina commented on page {number}", target_url=f"/docs/{number}")
    visitor = Visitor(service, sign_in("alice"))
    took: dict[str, list[float]] = {"/": [], "/api/notifications?limit=30": []}
    with visitor.socket:
        for _ in range(TURNS):
            for path, seconds in took.items():
                seconds.append(visitor.seconds(path))
    page, listed = (statistics.median(seconds) for seconds in took.values())
    print(f"page {page * 1000:.2f} ms, list {listed * 1000:.2f} ms, ratio {page / listed:.2f}")
    assert page / listed <= 2
