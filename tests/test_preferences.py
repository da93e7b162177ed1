"""What a user chose: merged field by field, held to what makes sense, the same for user and program."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from conftest import Running, problem, user_token

Json = dict[str, Any]
DEFAULTS: Json = {
    "in_app_enabled": True, "email_enabled": False, "push_enabled": False, "digest_minutes": 5,
    "min_severity": "warning", "quiet_from": None, "quiet_to": None, "timezone": "UTC", "locale": "en",
    "events": {},
}  # fmt: skip
OTHERS: Json = {
    "in_app_enabled": False, "email_enabled": True, "push_enabled": True, "digest_minutes": 0,
    "min_severity": "critical", "quiet_from": "22:00", "quiet_to": "07:30", "timezone": "Asia/Kolkata",
    "locale": "pt-BR", "events": {"comment.*": {"email": False}},
}  # fmt: skip


def chosen(one: httpx.Client, path: str = "/api/preferences", **changes: Any) -> Json:
    """The choices after a change."""
    reply = one.patch(path, json=changes)
    assert reply.status_code == 200, reply.text
    assert reply.json().keys() == {"preferences"}
    return reply.json()["preferences"]


def test_who_chose_nothing_has_the_defaults_and_no_row(
    alice: httpx.Client, api: httpx.Client, sql: Callable[..., Any], post: Callable[..., Json]
) -> None:
    assert alice.get("/api/preferences").json() == {"preferences": DEFAULTS}
    post()
    assert api.get("/api/users/alice").json()["preferences"] == DEFAULTS
    assert sql("SELECT count(*) FROM notification_preferences") == [(0,)]


def test_each_choice_changes_alone(alice: httpx.Client, bob: httpx.Client) -> None:
    expected = dict(DEFAULTS)
    for name, value in OTHERS.items():
        expected[name] = value
        assert chosen(alice, **{name: value}) == expected
        assert alice.get("/api/preferences").json() == {"preferences": expected}
    assert chosen(alice) == expected, "an empty change changes nothing"
    for name, value in DEFAULTS.items():
        if name != "events":
            expected[name] = value
            assert chosen(alice, **{name: value}) == expected
    assert bob.get("/api/preferences").json() == {"preferences": DEFAULTS}


def test_camel_case_is_taken_too_but_not_inside_events(alice: httpx.Client) -> None:
    told = chosen(alice, emailEnabled=True, digestMinutes=9, events={"orderPaid.*": {"email": False}})
    assert told == DEFAULTS | {
        "email_enabled": True, "digest_minutes": 9, "events": {"orderPaid.*": {"email": False}},
    }  # fmt: skip


def test_events_are_merged_and_null_removes(alice: httpx.Client) -> None:
    assert chosen(alice, events={"a.*": {"email": False}, "b": {"push": False}})["events"] == {
        "a.*": {"email": False}, "b": {"push": False},
    }  # fmt: skip
    assert chosen(alice, events={"a.*": {"webhook": True}})["events"] == {
        "a.*": {"email": False, "webhook": True}, "b": {"push": False},
    }  # fmt: skip
    assert chosen(alice, events={"b": None, "never": None})["events"] == {
        "a.*": {"email": False, "webhook": True}
    }
    assert chosen(alice, events={"a.*": {"email": None}})["events"] == {"a.*": {"webhook": True}}
    assert chosen(alice, events={"a.*": {"webhook": None}})["events"] == {}
    assert chosen(alice, events={})["events"] == {}


def test_values_that_make_no_sense_are_named_and_change_nothing(
    alice: httpx.Client, api: httpx.Client, contents: Callable[[], Json]
) -> None:
    chosen(alice, digest_minutes=7)
    before = contents()
    wrong: dict[str, list[Any]] = {
        "in_app_enabled": [None, 1, "true"], "email_enabled": [None, 0], "push_enabled": ["x"],
        "digest_minutes": [-1, 1.5, "5", None, 10**9], "min_severity": ["", "none", None, 3],
        "quiet_from": ["24:00", "9:00", "22:60", "22:00:00", "", "x", 5, "22:00\n"],
        "quiet_to": ["25:00", True],
        "timezone": ["", "Nowhere/Land", None, 5, "../etc/passwd", "UTC\n", "x" * 100],
        "locale": ["", None, 5, "<b>"],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            problem(alice.patch("/api/preferences", json={name: value}), 400, name)
            problem(api.patch("/api/users/alice/preferences", json={name: value}), 400, name)
    for events in (
        None,
        [],
        "x",
        {"a": True},
        {"a": {"email": "no"}},
        {"a": {"sms": True}},
        {"": {}},
        {"x" * 121: {}},
    ):
        told = problem(alice.patch("/api/preferences", json={"events": events}), 400)
        assert told["errors"][0]["field"].startswith("events"), (events, told)
    both = alice.patch("/api/preferences", json={"locale": "de", "digest_minutes": -1})
    problem(both, 400, "digest_minutes")
    assert contents() == before


def test_events_may_not_grow_without_end(alice: httpx.Client) -> None:
    sizes = []
    for turn in range(12):
        events = {f"event-{turn}-{number}".ljust(110, "x"): {"email": False} for number in range(100)}
        sizes.append(alice.patch("/api/preferences", json={"events": events}))
    assert sizes[0].status_code == 200
    problem(sizes[-1], 400, "events")


def test_a_program_sees_and_sets_what_the_user_does(api: httpx.Client, alice: httpx.Client) -> None:
    assert chosen(api, "/api/users/alice/preferences", **OTHERS) == OTHERS
    assert alice.get("/api/preferences").json() == {"preferences": OTHERS}
    assert chosen(alice, digest_minutes=3)["digest_minutes"] == 3
    assert api.get("/api/users/alice").json()["preferences"]["digest_minutes"] == 3


def test_changes_of_different_choices_at_once_all_hold(
    service: Running, make_key: Callable[[str], str], api: httpx.Client
) -> None:
    """The very first ones above all: a user who has no row yet is set up by several requests at once."""
    program = {"Authorization": f"Bearer {make_key('send')}"}

    async def choose_all(user: str) -> list[httpx.Response]:
        own = {"Authorization": f"Bearer {user_token(user)}"}
        async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
            return await asyncio.gather(
                client.put(f"/api/users/{user}", json={"email": f"{user}@example.com"}, headers=program),
                client.patch("/api/preferences", json={"email_enabled": True}, headers=own),
                client.patch("/api/preferences", json={"digest_minutes": 9}, headers=own),
                client.patch("/api/preferences", json={"events": {"a": {"email": False}}}, headers=own),
                client.patch("/api/preferences", json={"events": {"b": {"push": False}}}, headers=own),
            )

    for number in range(15):
        user = f"new-{number}"
        replies = asyncio.run(choose_all(user))
        assert [reply.status_code for reply in replies] == [200] * 5
        held = api.get(f"/api/users/{user}").json()
        assert held["email"] == f"{user}@example.com"
        assert held["preferences"] == DEFAULTS | {
            "email_enabled": True, "digest_minutes": 9,
            "events": {"a": {"email": False}, "b": {"push": False}},
        }  # fmt: skip
