"""The unread count is always what counting the rows gives, whatever happened before or happens meanwhile."""

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import httpx
from conftest import Running, user_token
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    multiple,
    rule,
    run_state_machine_as_test,
)

Json = dict[str, Any]
Sql = Callable[..., list[tuple[Any, ...]]]
NOTE = {"event_name": "comment.created", "title": "A comment", "body": "Inside"}
COUNT = "SELECT count(*) FROM notifications WHERE user_id = %s AND read_at IS NULL AND archived_at IS NULL"
USERS = itertools.count()


def test_the_count_is_right_after_any_sequence_of_changes(
    api: httpx.Client, service: Running, sql: Sql, client: Callable[..., httpx.Client]
) -> None:
    class Inbox(RuleBasedStateMachine):
        notes: Bundle[str] = Bundle("notes")

        def __init__(self) -> None:
            super().__init__()
            self.user = f"user-{next(USERS)}"
            self.own = client(service.url, user_token(self.user))
            self.known: set[str] = set()

        def check(self, told: Json) -> None:
            assert told["unread_count"] == sql(COUNT, self.user)[0][0]

        @rule(target=notes, number=st.integers(1, 3), key=st.none() | st.sampled_from("ab"))
        def create(self, number: int, key: str | None) -> Any:
            items = [NOTE | {"user_id": self.user, "idempotency_key": key} for _ in range(number)]
            results = api.post("/api/notifications/batch", json={"notifications": items}).json()["results"]
            self.known |= {result["id"] for result in results}
            self.check(self.own.get("/api/unread-count").json())
            return multiple(*{result["id"] for result in results})

        @rule(id=notes)
        def read(self, id: str) -> None:
            reply = self.own.patch("/api/notifications", json={"notification_id": id})
            self.follow(reply, id)

        @rule(id=notes, read=st.none() | st.booleans(), archived=st.booleans())
        def change(self, id: str, read: bool | None, archived: bool) -> None:
            body = {"archived": archived} | ({} if read is None else {"read": read})
            self.follow(self.own.patch(f"/api/notifications/{id}", json=body), id)

        def follow(self, reply: httpx.Response, id: str) -> None:
            assert reply.status_code == (200 if id in self.known else 404)
            if id in self.known:
                self.check(reply.json())

        @rule()
        def mark_all(self) -> None:
            told = self.own.patch("/api/notifications", json={"all": True}).json()
            assert told["unread_count"] == 0
            self.check(told)

        @rule(id=notes)
        def mark_all_before(self, id: str) -> None:
            reply = self.own.patch("/api/notifications", json={"all": True, "before": id})
            self.follow(reply, id)

        @rule()
        def list_them(self) -> None:
            told = self.own.get("/api/notifications", params={"limit": 100, "unread": 1}).json()
            self.check(told)
            assert len(told["notifications"]) == told["unread_count"]

        @rule(id=consumes(notes))
        def erase(self, id: str) -> None:
            assert api.delete(f"/api/users/{self.user}").status_code == 204
            self.known.clear()
            self.check(self.own.get("/api/unread-count").json())

    rounds = settings(
        max_examples=15, stateful_step_count=20, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Inbox, settings=rounds)
    assert next(USERS) > 10


TASKS, OPERATIONS, READERS = 50, 200, 4


async def live(session: aiohttp.ClientSession, url: str, key: str, seed: int, meet: asyncio.Barrier) -> None:
    """One task's operations; every 50 of them all tasks stand still for a moment."""
    chance = random.Random(seed)
    as_program = {"Authorization": f"Bearer {key}"}
    known: dict[str, list[str]] = {f"reader-{number}": [] for number in range(READERS)}
    proofs = {user: {"Authorization": f"Bearer {user_token(user)}"} for user in known}

    async def ask(method: str, path: str, proof: Json, body: Json | None = None) -> Json:
        async with session.request(method, url + path, headers=proof, json=body) as reply:
            assert reply.status in (200, 201, 204, 404), await reply.text()
            return await reply.json() if reply.status in (200, 201) else {}

    for step in range(OPERATIONS):
        if step % 50 == 0:
            await meet.wait()
            await meet.wait()
        user = chance.choice(list(known))
        kind = chance.randrange(100)
        note = chance.choice(known[user]) if known[user] else None
        if kind < 40 or note is None:
            told = await ask("POST", "/api/notifications", as_program, NOTE | {"user_id": user})
            known[user].append(told["notification"]["id"])
        elif kind < 60:
            told = await ask("PATCH", "/api/notifications", proofs[user], {"notification_id": note})
        elif kind < 85:
            body = {"read": chance.random() < 0.4, "archived": chance.random() < 0.4}
            told = await ask("PATCH", f"/api/notifications/{note}", proofs[user], body)
        elif kind < 92:
            told = await ask("PATCH", "/api/notifications", proofs[user], {"all": True, "before": note})
        elif kind < 94:
            told = await ask("PATCH", "/api/notifications", proofs[user], {"all": True})
        elif kind < 99:
            told = await ask("GET", "/api/notifications?limit=1", proofs[user])
        else:
            told = await ask("DELETE", f"/api/users/{user}", as_program)
        assert told.get("unread_count", 0) >= 0


def test_the_count_is_right_after_50_tasks_changed_everything_at_once(
    serve: Callable[..., Running], make_key: Callable[[str], str], sql: Sql
) -> None:
    service, key = serve(), make_key("send")

    async def live_together() -> None:
        meet = asyncio.Barrier(TASKS + 1)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=TASKS)) as session:
            tasks = [
                asyncio.create_task(live(session, service.url, key, seed, meet)) for seed in range(TASKS)
            ]
            together = asyncio.gather(*tasks)
            for _ in range(OPERATIONS // 50):
                await meet.wait()
                await compare(session)
                await meet.wait()
            await together
            await compare(session)

    async def compare(session: aiohttp.ClientSession) -> None:
        for number in range(READERS):
            user = f"reader-{number}"
            headers = {"Authorization": f"Bearer {user_token(user)}"}
            async with session.get(f"{service.url}/api/unread-count", headers=headers) as reply:
                assert await reply.json() == {"unread_count": sql(COUNT, user)[0][0]}

    asyncio.run(live_together())
    assert sql("SELECT count(*) > 0 FROM notifications") == [(True,)]
