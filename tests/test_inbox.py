"""A user's inbox: what is listed, in what order, what is read, what is archived."""

import asyncio
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import uuid4

import httpx
from conftest import Running, problem, user_token

Json = dict[str, Any]
Post = Callable[..., Json]
JSON = {"Content-Type": "application/json"}


def titles(one: httpx.Client, **wanted: Any) -> list[str]:
    """The titles of the first page."""
    return [note["title"] for note in one.get("/api/notifications", params=wanted).json()["notifications"]]


def change(one: httpx.Client, note: Json, **wanted: bool) -> Json:
    reply = one.patch(f"/api/notifications/{note['id']}", json=wanted)
    assert reply.status_code == 200, reply.text
    return reply.json()


# ─── Listing ───


def test_a_notification_appears_in_the_inbox_and_counts_as_unread(alice: httpx.Client, post: Post) -> None:
    sent = post(title="Build failed", severity="warning", data={"build": 7})
    listing = alice.get("/api/notifications").json()
    assert [n["id"] for n in listing["notifications"]] == [sent["id"]]
    assert listing["notifications"][0]["data"] == {"build": 7}
    assert listing["unread_count"] == 1
    assert listing["next_cursor"] is None


def test_the_newest_is_first_and_only_ones_own_are_listed(
    alice: httpx.Client, bob: httpx.Client, post: Post
) -> None:
    for title in ("one", "two", "three"):
        post(title=title)
        post("bob", title=f"bob's {title}")
    assert titles(alice) == ["three", "two", "one"]
    assert titles(bob) == ["bob's three", "bob's two", "bob's one"]
    assert alice.get("/api/unread-count").json() == {"unread_count": 3}


def test_filters_choose_unread_archived_and_events(alice: httpx.Client, post: Post) -> None:
    notes = {}
    for event in ("comment.created", "comment.reply.new", "comment", "commented", "build.failed", "comment."):
        notes[event] = post(title=event, event_name=event)
    change(alice, notes["comment.created"], read=True)
    change(alice, notes["build.failed"], archived=True)
    assert titles(alice) == ["comment.", "commented", "comment", "comment.reply.new", "comment.created"]
    assert titles(alice, unread=1) == ["comment.", "commented", "comment", "comment.reply.new"]
    assert titles(alice, unread=0) == titles(alice)
    assert titles(alice, archived=1) == ["build.failed"]
    assert titles(alice, archived=1, unread=1) == ["build.failed"]
    assert titles(alice, event="comment.*") == ["comment.", "comment.reply.new", "comment.created"]
    assert titles(alice, event="comment.reply.*") == ["comment.reply.new"]
    assert titles(alice, event="comment") == ["comment"]
    assert titles(alice, event="*") == titles(alice)
    assert titles(alice, event="comment.*", unread=1) == ["comment.", "comment.reply.new"]
    assert titles(alice, event="build.*", archived=1) == ["build.failed"]
    assert titles(alice, event="nothing.*") == []


def test_wildcards_of_sql_mean_nothing_in_an_event_filter(alice: httpx.Client, post: Post) -> None:
    for event in ("a_b.x", "aXb.x", "a%b.x", "anything.x"):
        post(title=event, event_name=event)
    assert titles(alice, event="a_b.*") == ["a_b.x"]
    assert titles(alice, event="a%b.*") == ["a%b.x"]
    assert titles(alice, event="a%") == titles(alice, event="%.*") == titles(alice, event="\\.*") == []


def test_the_count_is_of_all_unread_whatever_is_filtered(alice: httpx.Client, post: Post) -> None:
    notes = [post(title=f"{number}", event_name=f"e{number}.x") for number in range(5)]
    change(alice, notes[0], read=True)
    change(alice, notes[1], archived=True)
    for wanted in ({}, {"unread": 1}, {"archived": 1}, {"event": "e4.*"}, {"limit": 1}):
        assert alice.get("/api/notifications", params=wanted).json()["unread_count"] == 3


def test_a_page_holds_up_to_its_limit_and_says_where_the_next_begins(alice: httpx.Client, post: Post) -> None:
    for number in range(35):
        post(title=f"{number}")
    assert len(titles(alice)) == 30
    for limit in (1, 34, 35, 100):
        page = alice.get("/api/notifications", params={"limit": limit}).json()
        assert len(page["notifications"]) == min(limit, 35)
        assert (page["next_cursor"] is None) == (limit >= 35)
    seen, cursor = [], None
    while True:
        wanted = {"limit": 7, **({"cursor": cursor} if cursor else {})}
        page = alice.get("/api/notifications", params=wanted).json()
        seen += [note["title"] for note in page["notifications"]]
        if not (cursor := page["next_cursor"]):
            break
    assert seen == [f"{number}" for number in reversed(range(35))]
    for limit in (0, 101):
        problem(alice.get("/api/notifications", params={"limit": limit}), 400, "limit")


def test_a_cursor_keeps_its_place_when_its_notification_is_archived(
    alice: httpx.Client, post: Post, api: httpx.Client
) -> None:
    notes = [post(title=f"{number}") for number in range(6)]
    cursor = alice.get("/api/notifications?limit=2").json()["next_cursor"]
    change(alice, notes[4], archived=True)
    assert titles(alice, limit=2, cursor=cursor) == ["3", "2"]


def test_paging_through_500_while_others_arrive_misses_none_and_shows_none_twice(
    alice: httpx.Client, api: httpx.Client
) -> None:
    body = {"event_name": "e", "title": "old", "body": "b", "user_id": "alice"}
    sent = api.post("/api/notifications/batch", json={"notifications": [body] * 500})
    old = {result["id"] for result in sent.json()["results"]}
    done = threading.Event()

    def arrive() -> None:
        while not done.is_set():
            assert api.post("/api/notifications", json=body | {"title": "new"}).status_code == 201

    arriving = threading.Thread(target=arrive)
    arriving.start()
    seen: list[str] = []
    cursor, wanted = None, {"limit": 23}
    try:
        while cursor or not seen:
            page = alice.get(
                "/api/notifications", params=wanted | ({"cursor": cursor} if cursor else {})
            ).json()
            seen += [note["id"] for note in page["notifications"]]
            cursor = page["next_cursor"]
    finally:
        done.set()
        arriving.join()
    assert len(seen) == len(set(seen)), "none twice"
    assert old <= set(seen), "none missed"
    assert seen == sorted(seen, reverse=True)
    assert alice.get("/api/unread-count").json()["unread_count"] > 500, "others did arrive meanwhile"


def test_an_unchanged_inbox_is_304_and_a_changed_one_is_not(
    alice: httpx.Client, bob: httpx.Client, post: Post
) -> None:
    sent = post()
    first = alice.get("/api/notifications")
    tag = first.headers["etag"]
    assert tag.startswith('"') and "no-store" not in first.headers["cache-control"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = alice.get("/api/notifications", headers={"If-None-Match": known})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag, known
    head = alice.head("/api/notifications", headers={"If-None-Match": tag})
    assert head.status_code == 304
    for one, wanted in ((alice, {"unread": 1}), (alice, {"archived": 1}), (bob, {})):
        assert (
            one.get("/api/notifications", params=wanted, headers={"If-None-Match": '"x"'}).status_code == 200
        )
    assert bob.get("/api/notifications", headers={"If-None-Match": tag}).status_code == 200
    change(alice, sent, read=True)
    changed = alice.get("/api/notifications", headers={"If-None-Match": tag})
    assert changed.status_code == 200 and changed.headers["etag"] != tag


def test_lists_asked_for_at_once_do_not_mix(service: Running, api: httpx.Client) -> None:
    users = [f"user-{number}" for number in range(12)]
    items = [
        {"user_id": user, "event_name": f"e{n % 3}.x", "title": f"{user}/{n}", "body": "b"}
        for user in users
        for n in range(6)
    ]
    assert api.post("/api/notifications/batch", json={"notifications": items}).status_code == 201
    ways = [({}, None), ({"limit": 2}, None), ({"event": "e1.*"}, "e1.x"), ({"event": "e2.x"}, "e2.x")]
    asked = [(user, wanted, event) for user in users for wanted, event in ways]

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=15) as client:
            proofs = {user: {"Authorization": f"Bearer {user_token(user)}"} for user in users}
            calls = (
                client.get("/api/notifications", params=way, headers=proofs[user]) for user, way, _ in asked
            )
            return await asyncio.gather(*calls)

    for reply, (user, wanted, event) in zip(asyncio.run(ask_all()), asked, strict=True):
        mine = [item for item in reversed(items) if item["user_id"] == user]
        expected = [item["title"] for item in mine if event in (None, item["event_name"])]
        limit = int(wanted.get("limit", 30))
        page = reply.json()
        assert [note["title"] for note in page["notifications"]] == expected[:limit]
        assert page["unread_count"] == 6 and (page["next_cursor"] is None) == (limit >= len(expected))


# ─── One ───


def test_one_is_shown_with_its_deliveries(alice: httpx.Client, api: httpx.Client, post: Post) -> None:
    api.put("/api/users/alice", json={"email": "alice@example.com"})
    api.patch("/api/users/alice/preferences", json={"email_enabled": True, "push_enabled": True})
    sent = post(severity="warning", batch_key="b")
    shown = alice.get(f"/api/notifications/{sent['id']}").json()
    del sent["inserted"]
    assert shown["notification"] == sent
    mail, push = sorted(shown["deliveries"], key=lambda one: one["channel"])
    wanted = {"channel", "target", "status", "reason", "attempts", "available_at", "sent_at", "last_error"}
    assert wanted <= mail.keys() and wanted <= push.keys()
    assert (mail["channel"], mail["target"], mail["status"]) == ("email", None, "queued")
    assert mail["attempts"] == 0 and mail["sent_at"] is None and mail["last_error"] is None
    assert datetime.fromisoformat(mail["available_at"]).tzinfo
    assert (push["status"], push["reason"], push["available_at"]) == ("suppressed", "no_address", None)


def test_an_unknown_one_is_404(alice: httpx.Client) -> None:
    problem(alice.get(f"/api/notifications/{uuid4()}"), 404)
    problem(alice.patch(f"/api/notifications/{uuid4()}", json={"read": True}), 404)
    problem(alice.patch("/api/notifications", json={"notification_id": str(uuid4())}), 404)


# ─── Read and unread ───


def test_marking_read_twice_keeps_the_first_moment(alice: httpx.Client, post: Post) -> None:
    sent = post()
    first = alice.patch("/api/notifications", json={"notification_id": sent["id"]}).json()
    second = alice.patch("/api/notifications", json={"notificationId": sent["id"]}).json()
    third = change(alice, sent, read=True)
    moments = {one["notification"]["read_at"] for one in (first, second, third)}
    assert len(moments) == 1 and datetime.fromisoformat(moments.pop()).tzinfo
    assert first["unread_count"] == second["unread_count"] == third["unread_count"] == 0


def test_read_and_archived_change_either_or_both_and_back(alice: httpx.Client, post: Post) -> None:
    sent, _ = post(), post()

    def state(answer: Json) -> tuple[bool, bool, int]:
        note = answer["notification"]
        return note["read_at"] is not None, note["archived_at"] is not None, answer["unread_count"]

    assert state(change(alice, sent, read=True)) == (True, False, 1)
    assert state(change(alice, sent, read=False)) == (False, False, 2)
    assert state(change(alice, sent, archived=True)) == (False, True, 1)
    assert state(change(alice, sent, read=True)) == (True, True, 1)
    assert state(change(alice, sent, archived=False)) == (True, False, 1)
    assert state(change(alice, sent, read=False, archived=True)) == (False, True, 1)
    assert state(change(alice, sent, read=True, archived=False)) == (True, False, 1)
    assert state(change(alice, sent, read=False, archived=False)) == (False, False, 2)


def test_a_change_moves_updated_at_and_nothing_else(alice: httpx.Client, post: Post) -> None:
    sent = post(
        data={"a": 1}, idempotency_key="k", batch_key="b", subject_key="s", summary="x", target_url="/y"
    )
    changed = change(alice, sent, read=True)["notification"]
    moved = {name for name in changed if changed[name] != sent[name]}
    assert moved == {"read_at", "updated_at"}
    assert changed["updated_at"] > sent["updated_at"]


def test_archived_ones_leave_the_list_and_the_count(alice: httpx.Client, post: Post) -> None:
    first, _ = post(title="first"), post(title="second")
    assert change(alice, first, archived=True)["unread_count"] == 1
    assert titles(alice) == ["second"]
    assert titles(alice, archived=1) == ["first"]
    assert alice.get("/api/unread-count").json() == {"unread_count": 1}
    assert alice.get(f"/api/notifications/{first['id']}").json()["notification"]["archived_at"]


def test_every_odd_change_is_400_and_changes_nothing(
    alice: httpx.Client, post: Post, contents: Callable[[], Json]
) -> None:
    id = post()["id"]
    before = contents()
    problem(alice.patch("/api/notifications"), 400)
    for content in (b"", b" ", b"{}", b"null", b"[]", b'{"read": true}', b'{"all": false}'):
        problem(alice.patch("/api/notifications", content=content, headers=JSON), 400)
    for odd in (
        {"all": None}, {"all": 1}, {"all": "true"}, {"all": []}, {"notification_id": None}, {"before": id},
        {"notification_id": id, "all": True}, {"notification_id": id, "before": id},
        {"all": False, "before": id}, {"notification_id": id, "all": False}, {"notification_id": [id]},
        {"notification_ids": [id]}, {"id": id}, {"all": True, "before": 5}, {"all": True, "before": "x"},
        {"all": True, "extra": 1},
    ):  # fmt: skip
        problem(alice.patch("/api/notifications", json=odd), 400)
    for odd in (
        {},
        {"read": None},
        {"read": 1},
        {"read": "true"},
        {"archived": None},
        {"read": True, "x": 1},
    ):
        problem(alice.patch(f"/api/notifications/{id}", json=odd), 400)
    problem(alice.patch(f"/api/notifications/{id}"), 400)
    assert contents() == before


# ─── All ───


def test_marking_all_read_leaves_the_archived_and_the_others_alone(
    alice: httpx.Client, bob: httpx.Client, post: Post
) -> None:
    notes = [post(title=f"{number}") for number in range(5)]
    post("bob")
    read_at = change(alice, notes[0], read=True)["notification"]["read_at"]
    change(alice, notes[1], archived=True)
    assert alice.patch("/api/notifications", json={"all": True}).json() == {"updated": 3, "unread_count": 0}
    assert alice.patch("/api/notifications", json={"all": True}).json() == {"updated": 0, "unread_count": 0}
    assert bob.get("/api/unread-count").json() == {"unread_count": 1}
    assert alice.get(f"/api/notifications/{notes[0]['id']}").json()["notification"]["read_at"] == read_at
    assert alice.get(f"/api/notifications/{notes[1]['id']}").json()["notification"]["read_at"] is None


def test_marking_all_up_to_one_leaves_newer_ones_unread(alice: httpx.Client, post: Post) -> None:
    notes = [post(title=f"{number}") for number in range(6)]
    told = alice.patch("/api/notifications", json={"all": True, "before": notes[3]["id"]}).json()
    assert told == {"updated": 4, "unread_count": 2}
    assert titles(alice, unread=1) == ["5", "4"]
    change(alice, notes[4], archived=True)
    told = alice.patch("/api/notifications", json={"all": True, "before": notes[4]["id"]}).json()
    assert told == {"updated": 0, "unread_count": 1}, "an archived one still tells the place"


def test_marking_all_up_to_an_unknown_one_is_404_and_changes_nothing(
    alice: httpx.Client, post: Post, contents: Callable[[], Json]
) -> None:
    post()
    theirs, before = post("bob")["id"], contents()
    for id in (str(uuid4()), theirs, "00000000-0000-0000-0000-000000000000"):
        problem(alice.patch("/api/notifications", json={"all": True, "before": id}), 404)
    assert contents() == before
