"""Whatever happens in whatever order: all messages together are the events, no event is in two, each ends once."""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running, user_token
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import DROP, Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
ENDS = {"sent", "failed", "suppressed", "cancelled"}
UUID = re.compile(r"/n/([0-9a-f-]{36})")
TIME_PASSES = [
    "UPDATE outbox SET available_at = now() WHERE state IN ('open', 'pending') AND user_id = ANY(%s)",
    "UPDATE rate_limits SET minute = minute - interval '1 minute' WHERE user_id = ANY(%s)",
    "UPDATE breakers SET paused_until = now() WHERE paused_until IS NOT NULL AND %s::text[] IS NOT NULL",
]
severity = st.sampled_from(["info", "warning", "warning", "warning", "critical"])
key = st.sampled_from([None, "a", "a", "b"])
user = st.integers(0, 1)
STEP = st.one_of(
    st.tuples(st.just("post"), user, severity, key),
    st.tuples(st.just("burst"), user, severity, key, st.integers(2, 9)),
    st.tuples(st.just("read"), st.integers(0, 30)),
    st.tuples(st.just("archive"), st.integers(0, 30)),
    st.tuples(st.just("resolve"), key),
    st.tuples(st.just("switch"), user, st.sampled_from(["email", "push"]), st.booleans()),
    st.tuples(st.just("mute"), user, st.sampled_from([True, False, None])),
    st.tuples(st.just("night"), user, st.booleans()),
    st.tuples(st.just("address"), user, st.booleans()),
    st.tuples(st.sampled_from(["send", "skip"]), user),
    st.tuples(st.just("time")),
    st.tuples(st.just("drain")),
    st.tuples(st.just("lease")),
    st.tuples(st.just("mail says"), st.sampled_from(["451 4.3.0 later", "554 5.6.0 no", DROP, None])),
    st.tuples(st.just("hook says"), st.sampled_from([500, 404, 429, None])),
    st.tuples(st.just("push says"), st.sampled_from([500, 403, DROP, None])),
)


class World:
    """Two users of their own for each example, and everything that may happen to them."""

    def __init__(
        self, number: int, service: Running, api: httpx.Client, sql: Sql, boxes: Any, drain: Any
    ) -> None:
        self.api, self.sql, self.drain = api, sql, drain
        self.mailbox, self.hookbox, self.pushbox = boxes
        self.users = [f"u{number}-{name}" for name in ("x", "y")]
        self.clients = [httpx.Client(base_url=service.url, trust_env=False) for _ in self.users]
        self.ids: list[tuple[int, str]] = []
        for name, client in zip(self.users, self.clients, strict=True):
            client.headers["Authorization"] = f"Bearer {user_token(name)}"
            api.put(f"/api/users/{name}", json={"email": f"{name}@example.org"})
            client.patch("/api/preferences", json={"email_enabled": True, "push_enabled": True})
            for _ in range(2):
                client.post("/api/push/subscriptions", json=self.pushbox.subscription().to_json())
            self.api.post("/api/webhooks", json={"url": f"{self.hookbox.url}/{name}", "user_id": name})

    def do(self, what: str, *given: Any) -> None:
        getattr(self, what.replace(" ", "_"))(*given)

    def post(self, user: int, severity: str, key: str | None) -> None:
        self.burst(user, severity, key, 1)

    def burst(self, user: int, severity: str, key: str | None, count: int) -> None:
        note = {
            "user_id": self.users[user],
            "event_name": "e",
            "title": "t",
            "body": "",
            "severity": severity,
        }
        notes = [note | {"batch_key": key, "subject_key": key and f"{self.users[0]} {key}"}] * count
        reply = self.api.post("/api/notifications/batch", json={"notifications": notes})
        assert reply.status_code == 201, reply.text
        self.ids += [(user, result["id"]) for result in reply.json()["results"]]

    def change(self, index: int, change: dict[str, bool]) -> None:
        if index < len(self.ids):
            user, id = self.ids[index]
            assert self.clients[user].patch(f"/api/notifications/{id}", json=change).status_code == 200

    def read(self, index: int) -> None:
        self.change(index, {"read": True})

    def archive(self, index: int) -> None:
        self.change(index, {"archived": True})

    def resolve(self, key: str | None) -> None:
        self.api.post("/api/resolve", json={"subject_key": f"{self.users[0]} {key}"})

    def switch(self, user: int, channel: str, on: bool) -> None:
        self.clients[user].patch("/api/preferences", json={f"{channel}_enabled": on})

    def mute(self, user: int, on: bool | None) -> None:
        events = {"e": on if on is None else {"email": on, "push": on, "webhook": on}}
        self.clients[user].patch("/api/preferences", json={"events": events})

    def night(self, user: int, on: bool) -> None:
        self.sql("UPDATE notification_preferences SET quiet_from = CASE WHEN %s::boolean THEN t.now - interval '1 hour' END,"
                 " quiet_to = t.now + interval '1 hour' FROM (SELECT (now() AT TIME ZONE 'UTC')::time AS now) t"
                 " WHERE user_id = %s", on, self.users[user])  # fmt: skip

    def address(self, user: int, there: bool) -> None:
        self.api.put(
            f"/api/users/{self.users[user]}",
            json={"email": f"{self.users[user]}@example.org" if there else None},
        )

    def send(self, user: int, button: str = "send") -> None:
        for waiting in self.clients[user].get("/api/outbox").json()["outbox"][:1]:
            reply = self.clients[user].post(f"/api/outbox/{waiting['id']}/{button}")
            assert reply.status_code in (200, 404)

    def skip(self, user: int) -> None:
        self.send(user, "skip")

    def time(self) -> None:
        for statement in TIME_PASSES:
            self.sql(statement, self.users)

    def lease(self) -> None:
        self.sql(
            "UPDATE outbox SET available_at = now() WHERE state = 'sending' AND user_id = ANY(%s)", self.users
        )

    def mail_says(self, answer: Any) -> None:
        self.mailbox.always("DATA", answer)

    def hook_says(self, answer: Any) -> None:
        for name in self.users:
            self.hookbox.always(f"/{name}", answer)

    def push_says(self, answer: Any) -> None:
        for path in list(self.pushbox.subscriptions)[-4:]:
            self.pushbox.always(path, answer)

    def end(self) -> None:
        """Everybody is well again, and time passes until nothing waits."""
        for says in (self.mail_says, self.hook_says, self.push_says):
            says(None)
        for user in range(2):
            self.night(user, False)
        for _ in range(20):
            self.time()
            self.drain()
            if not self.sql(
                "SELECT 1 FROM outbox WHERE user_id = ANY(%s) AND state IN ('open', 'pending')", self.users
            ):
                break

    def check(self) -> None:
        rows = self.sql("SELECT notification_id::text, channel, target, status, reason, message_id::text, sent_at"
                        " FROM deliveries WHERE user_id = ANY(%s)", self.users)  # fmt: skip
        assert {status for _, _, _, status, *_ in rows} <= ENDS
        assert {id for id, *_ in rows} <= {id for _, id in self.ids}
        for _, _, _, status, reason, _, sent_at in rows:
            assert (reason is not None) == (status == "suppressed") and (sent_at is not None) == (
                status == "sent"
            )
        sent = {channel: [row for row in rows if row[1] == channel and row[3] == "sent"] for channel in
                ("email", "push", "webhook")}  # fmt: skip
        self.check_mails(sent["email"])
        self.check_hooks(sent["webhook"])
        pushes = Counter(row[5] for row in sent["push"])
        states = dict(self.sql("SELECT id::text, state FROM outbox WHERE user_id = ANY(%s)", self.users))
        assert set(states.values()) <= {"sent", "failed", "void"}
        assert all(states[message] == "sent" for message in pushes)

    def check_mails(self, sent: list[Any]) -> None:
        """Each mail is a message, names what the message held and counts what it does not name."""
        expected = Counter(message for *_, message, _ in sent)
        letters = {}
        for letter in self.mailbox.messages:
            if letter.recipients[0].removesuffix("@example.org") in self.users:
                letters[str(letter.message["Message-ID"])[1:37]] = letter
        assert expected.keys() <= letters.keys(), "sent, but nothing arrived"
        shown: Counter[str] = Counter()
        for message, count in expected.items():
            named = set(UUID.findall(letters[message].text))
            assert named <= {id for id, *_, held, _ in sent if held == message}
            assert len(named) == min(count, 10)
            if count > 1:
                assert letters[message].subject == f"{count} notifications"
            shown.update(named)
        assert all(times == 1 for times in shown.values())

    def check_hooks(self, sent: list[Any]) -> None:
        arrived = Counter(
            hit.json["data"]["id"] for hit in self.hookbox.requests if hit.path.strip("/") in self.users
        )
        assert all(arrived[id] >= 1 for id, *_ in sent)


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering(
        email_per_minute=3, push_per_minute=3, webhook_per_minute=5, max_attempts=3, channel_timeout_seconds=2
    )


def test_all_messages_together_are_the_events_and_each_ends_once(
    service: Running,
    api: httpx.Client,
    sql: Sql,
    mailbox: Mailbox,
    hookbox: Hookbox,
    pushbox: Pushbox,
    drain: Any,
) -> None:
    numbers = itertools.count()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(STEP, min_size=3, max_size=25))
    def check(steps: list[Any]) -> None:
        world = World(next(numbers), service, api, sql, (mailbox, hookbox, pushbox), drain)
        try:
            for step in steps:
                world.do(*step)
            world.end()
            world.check()
        finally:
            for user in world.clients:
                user.close()

    check()
