"""A user's inbox: what is listed, what is read, what is counted."""

from collections.abc import Callable
from typing import Any

import httpx

Post = Callable[..., dict[str, Any]]


def test_a_notification_appears_in_the_inbox_and_counts_as_unread(alice: httpx.Client, post: Post) -> None:
    sent = post(title="Build failed", severity="warning", data={"build": 7})
    listing = alice.get("/api/notifications").json()
    assert [n["id"] for n in listing["notifications"]] == [sent["id"]]
    assert listing["notifications"][0]["data"] == {"build": 7}
    assert listing["unread_count"] == 1
    assert listing["next_cursor"] is None


def test_marking_read_twice_keeps_the_first_moment(alice: httpx.Client, post: Post) -> None:
    sent = post()
    first = alice.patch("/api/notifications", json={"notification_id": sent["id"]}).json()
    second = alice.patch("/api/notifications", json={"notificationId": sent["id"]}).json()
    assert first["notification"]["read_at"] == second["notification"]["read_at"]
    assert first["unread_count"] == second["unread_count"] == 0
