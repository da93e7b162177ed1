"""Browsers that may be pushed to: one browser, one reader."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from conftest import Running, browser, problem, user_token

Sql = Callable[..., list[tuple[Any, ...]]]
ENDPOINT = "https://push.example.com/send/1?x=y"
OWNERS = "SELECT user_id, endpoint FROM push_subscriptions ORDER BY 1, 2"


def test_equal_registrations_at_once_are_one_browser(service: Running, sql: Sql) -> None:
    async def register_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
            calls = []
            for user in ("alice", "bob") * 10:
                proof = {"Authorization": f"Bearer {user_token(user)}"}
                calls.append(client.post("/api/push/subscriptions", json=browser(ENDPOINT), headers=proof))
            return await asyncio.gather(*calls)

    assert {reply.status_code for reply in asyncio.run(register_all())} <= {200, 201}
    assert len(sql(OWNERS)) == 1


def test_what_cannot_be_a_subscription_is_refused(alice: httpx.Client, sql: Sql) -> None:
    long = "https://x.example/" + "x" * 2000
    wrong: dict[str, list[Any]] = {
        "endpoint": ["", "x", "ftp://x/", "javascript:x", "https://", "https://u:p@x.y/", "https://x.y:99999/z", "https://x..y/z", "https://[::1/z", 5, None, "https://x y/", long],
        "p256dh": ["", "x", "A" * 87, 5, None, "B" * 300, "BCVxsr7N\n", "\u00e9" * 87],
        "auth": ["", "x", "A" * 40, 5, None, "!" * 22],
    }  # fmt: skip
    for kind, value in ((kind, value) for kind, values in wrong.items() for value in values):
        body = browser(ENDPOINT)
        (body if kind == "endpoint" else body["keys"])[kind] = value
        told = problem(alice.post("/api/push/subscriptions", json=body), 400)
        assert kind in told["errors"][0]["field"] or told["errors"][0]["field"] == "keys.p256dh", told
    problem(alice.post("/api/push/subscriptions", json={"endpoint": ENDPOINT}), 400, "keys")
    assert sql(OWNERS) == []


def test_the_key_for_push_is_a_public_one_and_stays_the_same(alice: httpx.Client) -> None:
    told = alice.get("/api/push/key")
    assert told.status_code == 200 and told.json().keys() == {"public_key"}
    key = told.json()["public_key"]
    assert len(key) == 87 and key.startswith("B") and "=" not in key
    assert alice.get("/api/push/key").json() == {"public_key": key}
