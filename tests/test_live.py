"""The live stream: a hint for every change, from any tab, device or process."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from conftest import SECRET, Running, app, eventually, user_token

Client = Callable[..., httpx.Client]


class Listener:
    """A reader of the stream in a thread of its own."""

    def __init__(self, client: httpx.Client) -> None:
        self.client, self.events, self.ended, self.ids = client, [], threading.Event(), []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        try:
            with self.client.stream("GET", "/api/stream") as reply:
                assert reply.headers["content-type"].startswith("text/event-stream")
                for line in reply.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(json.loads(line[6:]))
        except httpx.HTTPError:
            pass
        self.ended.set()

    def sees(self, count: int) -> Any:
        return eventually(lambda: self.events and self.events[-1]["unread_count"] == count)


@contextmanager
def streaming(service: Running, client: Client, user: str, n: int = 1) -> Iterator[list[Listener]]:
    listeners = [Listener(client(service.url, user_token(user))) for _ in range(n)]
    eventually(lambda: all(one.events for one in listeners))
    yield listeners


def test_connecting_tells_the_count_at_once(service: Running, client: Client, post: Any) -> None:
    post("alice")
    with streaming(service, client, "alice") as (tab,):
        assert tab.events[0]["unread_count"] == 1
        assert tab.events[0]["newest_id"]


def test_every_tab_follows_every_change_and_strangers_hear_nothing(
    service: Running, client: Client, alice: httpx.Client, post: Any
) -> None:
    with streaming(service, client, "alice", 2) as tabs, streaming(service, client, "bob") as (stranger,):
        sent = post("alice")
        for tab in tabs:
            tab.sees(1)
        alice.patch(f"/api/notifications/{sent['id']}", json={"read": True})
        for tab in tabs:
            tab.sees(0)
        assert len(stranger.events) == 1


def test_a_stream_ends_with_its_token(
    service: Running, client: Client, post: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "STREAM_COMMENT_SECONDS", 0.1)
    brief = app.make_token(SECRET, "alice", app.timedelta(seconds=4))
    tab = Listener(client(service.url, brief))
    eventually(lambda: tab.events)
    with streaming(service, client, "alice") as (other,):
        eventually(tab.ended.is_set)
        post("alice")
        other.sees(1)
    assert tab.events[-1]["unread_count"] == 0


def test_a_ninth_stream_closes_the_oldest(service: Running, client: Client) -> None:
    with streaming(service, client, "alice", 8) as tabs:
        hub = service.service.hub
        oldest = next(iter(hub.streams["alice"]))
        with streaming(service, client, "alice"):
            eventually(lambda: oldest not in hub.streams["alice"])
            assert len(hub.streams["alice"]) == 8
            assert sum(tab.ended.is_set() for tab in tabs) <= 1


def test_a_change_in_one_process_reaches_the_streams_of_another(
    serve: Callable[..., Running], client: Client, make_key: Callable[[str], str]
) -> None:
    first, second = serve(), serve()
    eventually(lambda: not first.service.hub.alone and not second.service.hub.alone)
    with streaming(second, client, "alice") as (tab,):
        body = {"user_id": "alice", "event_name": "a", "title": "b", "body": "c"}
        started = time.monotonic()
        assert client(first.url, make_key("send")).post("/api/notifications", json=body).status_code == 201
        tab.sees(1)
        assert time.monotonic() - started < 5


def test_clients_that_reset_leave_no_stream_behind(service: Running, client: Client) -> None:
    hub = service.service.hub
    for n in range(30):
        with client(service.url, user_token(f"user-{n}")).stream("GET", "/api/stream") as reply:
            assert reply.status_code == 200
    eventually(lambda: not hub.streams)
