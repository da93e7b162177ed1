"""Quiet hours: everything but critical waits for their end, in the user's own time, whatever the clocks do."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from conftest import Running
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import Hookbox, Mailbox, Pushbox

Sql = Callable[..., list[tuple[Any, ...]]]
Post = Callable[..., dict[str, Any]]
OVER = "UPDATE notification_preferences SET quiet_from = NULL, quiet_to = NULL"
DUE = "UPDATE outbox SET available_at = now() WHERE state IN ('open', 'pending')"


@pytest.fixture
def service(delivering: Callable[..., Running]) -> Running:
    return delivering()


@pytest.fixture
def sleep(reach: Callable[..., None]) -> Callable[..., None]:
    """Let a user's night be from an hour ago until two hours from now, on the user's clock."""

    def begin(zone: str = "UTC", **choices: Any) -> None:
        now = datetime.now(ZoneInfo(zone))
        edges = {
            "quiet_from": f"{now - timedelta(hours=1):%H:%M}",
            "quiet_to": f"{now + timedelta(hours=2):%H:%M}",
        }
        usual = {"email": "alice@example.org", "timezone": zone, "email_enabled": True}
        reach("alice", **usual | edges | choices)

    return begin


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/Los_Angeles", "Pacific/Kiritimati"])
def test_all_but_critical_waits_for_the_end_of_the_night_and_leaves_as_one_digest(
    sleep: Callable[..., None], post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None], zone: str
) -> None:
    sleep(zone)
    ids = [post(severity="warning", batch_key=key)["id"] for key in ("a", "b", None)]
    post(severity="critical", title="Fire", batch_key="a")
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["Fire"]
    [(due,)] = sql("SELECT available_at FROM outbox WHERE state = 'open'")
    end = (datetime.now(UTC) + timedelta(hours=2)).replace(second=0, microsecond=0)
    assert abs(due - end) <= timedelta(minutes=1)
    sql(OVER)
    sql(DUE)
    drain()
    assert [letter.subject for letter in mailbox.messages[1:]] == ["3 notifications"]
    assert all(id in mailbox.messages[1].text for id in ids)


def test_who_moves_or_ends_the_night_need_not_wait_for_the_end_it_had(
    sleep: Callable[..., None], reach: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    sleep()
    post(severity="warning")
    sooner = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=30)
    reach("alice", quiet_to=f"{sooner:%H:%M}")
    drain()
    assert not mailbox.messages
    assert sql("SELECT digest, available_at FROM outbox WHERE state = 'open'") == [("quiet", sooner)]
    reach("alice", digest_minutes=0)
    assert sql("SELECT available_at FROM outbox") == [(sooner,)]
    reach("alice", quiet_from=None, quiet_to=None)
    drain()
    assert len(mailbox.messages) == 1


def test_the_digest_of_a_night_is_dated_when_it_leaves(
    reach: Callable[..., None], sleep: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    sleep()
    post(severity="warning")
    post(severity="critical")
    drain()
    aged = "created_at = created_at - interval '8 hours'"
    sql(f"UPDATE outbox SET {aged}")
    sql(f"UPDATE notifications SET {aged}")
    sql(OVER)
    sql(DUE)
    drain()
    alone, digest = (parsedate_to_datetime(letter.message["Date"]) for letter in mailbox.messages)
    assert abs(digest - alone) < timedelta(hours=1)


def test_a_digest_that_comes_due_at_night_waits_for_the_morning_too(
    reach: Callable[..., None], sleep: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    for key in ("a", "a", "b"):
        post(severity="warning", batch_key=key)
    sleep()
    post(severity="warning")
    sql(DUE)
    drain()
    assert not mailbox.messages
    assert sql("SELECT digest, state FROM outbox") == [("quiet", "open")]
    sql(OVER)
    sql(DUE)
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["4 notifications"]


def test_a_message_that_did_not_leave_before_the_night_leaves_with_the_digest_after_it(
    delivering: Any,
    reach: Any,
    sleep: Any,
    post: Post,
    mailbox: Mailbox,
    sql: Sql,
    drain: Any,
    service: Running,
) -> None:
    """It was to leave at once, but nothing was sending just then."""
    reach("alice", email="alice@example.org", email_enabled=True)
    with service.paused():
        post(severity="warning", title="first")
        post(severity="warning", title="second")
        sleep()
    drain()
    assert not mailbox.messages
    assert sql("SELECT digest, state FROM outbox") == [("quiet", "open")]
    sql(OVER)
    sql(DUE)
    drain()
    assert [letter.subject for letter in mailbox.messages] == ["2 notifications"]


def test_a_retry_waits_for_the_morning_and_keeps_its_identity(
    reach: Any, sleep: Any, post: Post, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    reach("alice", email="alice@example.org", email_enabled=True)
    mailbox.script("DATA", "451 4.3.0 later")
    post(severity="warning", title="Tried")
    drain()
    [(message,)] = sql("SELECT id FROM outbox WHERE state = 'pending'")
    sleep()
    sql(DUE)
    drain()
    assert not mailbox.messages
    assert sql("SELECT available_at > now() + interval '1 hour' FROM outbox") == [(True,)]
    reach("alice", quiet_from=None, quiet_to=None)
    drain()
    assert str(message) in str(mailbox.messages[0].message["Message-ID"])


def test_critical_ones_beyond_their_30_a_minute_do_not_wait_for_the_morning(
    delivering: Any, sleep: Any, api: httpx.Client, mailbox: Mailbox, sql: Sql, drain: Callable[[], None]
) -> None:
    sleep()
    body = {"user_id": "alice", "event_name": "e", "title": "t", "body": "", "severity": "critical"}
    sql("INSERT INTO rate_limits SELECT 'alice', 'email critical', '00000000-0000-0000-0000-000000000000',"
        " date_trunc('minute', now()) + interval '1 minute', 30")  # fmt: skip
    limited = delivering(email_per_minute=5, delivery_concurrency=0)
    reply = httpx.post(f"{limited.url}/api/notifications", json=body, headers=api.headers)
    assert reply.status_code == 201
    assert sql("SELECT digest, critical FROM outbox") == [("overflow", True)]
    sql(DUE)
    drain()
    assert len(mailbox.messages) == 1


def test_pushes_wait_as_one_and_webhooks_know_no_night(
    sleep: Any, api: httpx.Client, alice: httpx.Client, post: Post, pushbox: Pushbox, hookbox: Hookbox, sql: Sql,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    sleep(push_enabled=True, email_enabled=False)
    alice.post("/api/push/subscriptions", json=pushbox.subscription().to_json())
    api.post("/api/webhooks", json={"url": hookbox.url})
    ids = [post(severity="warning")["id"] for _ in range(3)]
    drain()
    assert len(hookbox.requests) == 3 and not pushbox.messages
    sql(OVER)
    sql(DUE)
    drain()
    [message] = pushbox.messages
    assert (message["title"], message["id"]) == ("3 notifications", ids[-1])


def test_half_a_night_is_none(reach: Any, post: Post, mailbox: Mailbox, drain: Callable[[], None]) -> None:
    now = datetime.now(UTC)
    reach(
        "alice", email="alice@example.org", email_enabled=True, quiet_from=f"{now - timedelta(hours=1):%H:%M}"
    )
    post(severity="warning", title="one end only")
    reach("alice", quiet_to=f"{now - timedelta(hours=1):%H:%M}")
    post(severity="warning", title="both the same")
    drain()
    assert len(mailbox.messages) == 2


# ─── The view that knows it all, asked about other moments than now ───


@pytest.fixture
def ask(postgresql: Any) -> Callable[..., datetime | None]:
    """Until when it is quiet at a moment, or None: the view's own text with another now()."""
    postgresql.autocommit = True
    view = postgresql.execute("SELECT pg_get_viewdef('quiet_users')").fetchone()[0].rstrip("; ")
    assert "now()" in view
    text = view.replace("now()", "%(moment)s::timestamptz")

    def until(zone: str, begin: str, end: str, moment: datetime) -> datetime | None:
        postgresql.execute("DELETE FROM notification_preferences")
        postgresql.execute(
            "INSERT INTO notification_preferences (user_id, timezone, quiet_from, quiet_to) VALUES ('u', %s, %s, %s)",
            (zone, begin, end),
        )
        rows = postgresql.execute(text, {"moment": moment}).fetchall()
        assert len(rows) <= 1
        return rows[0][1] if rows else None

    return until


def at(zone: str, *parts: int, fold: int = 0) -> datetime:
    return datetime(*parts, tzinfo=ZoneInfo(zone), fold=fold).astimezone(UTC)


BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"


MOMENTS = [
    # within one day, and its edges: the first minute is in, the last is out
    (BERLIN, "12:00", "14:00", at(BERLIN, 2026, 1, 5, 12, 0), at(BERLIN, 2026, 1, 5, 14, 0)),
    (BERLIN, "12:00", "14:00", at(BERLIN, 2026, 1, 5, 11, 59, 59), None),
    (BERLIN, "12:00", "14:00", at(BERLIN, 2026, 1, 5, 14, 0), None),
    # across midnight, before and after it
    (BERLIN, "22:00", "07:00", at(BERLIN, 2026, 1, 5, 23, 0), at(BERLIN, 2026, 1, 6, 7, 0)),
    (BERLIN, "22:00", "07:00", at(BERLIN, 2026, 1, 6, 3, 0), at(BERLIN, 2026, 1, 6, 7, 0)),
    (BERLIN, "22:00", "07:00", at(BERLIN, 2026, 1, 6, 8, 0), None),
    # the user's midnight, not the server's
    ("Pacific/Kiritimati", "22:00", "07:00", datetime(2026, 1, 5, 10, 0, tzinfo=UTC),
     at("Pacific/Kiritimati", 2026, 1, 6, 7, 0)),
    # clocks go forward at 2 to 3: an end that does not exist moves to the next valid time
    (BERLIN, "22:00", "02:30", at(BERLIN, 2026, 3, 29, 1, 0), datetime(2026, 3, 29, 1, 0, tzinfo=UTC)),
    (NEW_YORK, "22:00", "02:30", at(NEW_YORK, 2026, 3, 8, 1, 0), at(NEW_YORK, 2026, 3, 8, 3, 0)),
    (LORD_HOWE, "22:00", "02:10", at(LORD_HOWE, 2026, 10, 4, 1, 0), at(LORD_HOWE, 2026, 10, 4, 2, 30)),
    # … and so does a beginning
    (BERLIN, "02:30", "05:00", at(BERLIN, 2026, 3, 29, 3, 0), at(BERLIN, 2026, 3, 29, 5, 0)),
    (BERLIN, "02:30", "05:00", at(BERLIN, 2026, 3, 29, 1, 59), None),
    # a night over the change is an hour shorter, an hour longer
    (BERLIN, "22:00", "07:00", at(BERLIN, 2026, 3, 28, 23, 0), datetime(2026, 3, 29, 5, 0, tzinfo=UTC)),
    (BERLIN, "22:00", "07:00", at(BERLIN, 2026, 10, 24, 23, 0), datetime(2026, 10, 25, 6, 0, tzinfo=UTC)),
    # clocks go back at 3 to 2: of an end that occurs twice the first counts
    (BERLIN, "22:00", "02:30", at(BERLIN, 2026, 10, 25, 1, 0), at(BERLIN, 2026, 10, 25, 2, 30)),
    (BERLIN, "22:00", "02:30", at(BERLIN, 2026, 10, 25, 2, 15, fold=1), None),
    (NEW_YORK, "22:00", "01:30", at(NEW_YORK, 2026, 11, 1, 0, 0), at(NEW_YORK, 2026, 11, 1, 1, 30)),
    # … and of a beginning: it stays quiet while the hour runs a second time
    (BERLIN, "02:30", "05:00", at(BERLIN, 2026, 10, 25, 2, 30), at(BERLIN, 2026, 10, 25, 5, 0)),
    (BERLIN, "02:30", "05:00", at(BERLIN, 2026, 10, 25, 2, 10, fold=1), at(BERLIN, 2026, 10, 25, 5, 0)),
]  # fmt: skip


def test_the_night_ends_when_the_users_clock_says_so(ask: Callable[..., datetime | None]) -> None:
    for zone, begin, end, moment, until in MOMENTS:
        assert ask(zone, begin, end, moment) == until, (zone, begin, end, moment)


ZONES = [
    "UTC",
    BERLIN,
    NEW_YORK,
    LORD_HOWE,
    "Asia/Kolkata",
    "America/St_Johns",
    "Pacific/Apia",
    "Africa/Casablanca",
]
CLOCK = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.integers(0, 59))


def test_it_is_quiet_exactly_from_the_first_instant_of_the_beginning_to_that_of_the_end(
    ask: Callable[..., datetime | None],
) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(ZONES), CLOCK, CLOCK, st.integers(0, 2 * 366 * 24 * 60))
    def check(zone: str, begin: str, end: str, minutes: int) -> None:
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
        assert ask(zone, begin, end, moment) == expected(zone, begin, end, moment)

    check()


def expected(zone: str, begin: str, end: str, moment: datetime) -> datetime | None:
    """The same, said differently: walk back to where the night began, if one began."""
    today = moment.astimezone(ZoneInfo(zone)).date()
    for days in (-1, 0):
        day = today + timedelta(days=days)
        first = reached(zone, day, begin)
        last = reached(zone, day + timedelta(days=int(end <= begin)), end)
        if begin != end and first <= moment < last:
            return last
    return None


def reached(zone: str, day: Any, clock: str) -> datetime:
    """The first instant at which the local clock shows this or more, on this date or later."""
    wanted = datetime.fromisoformat(f"{day} {clock}")
    instant = wanted.replace(tzinfo=UTC) - timedelta(hours=15)
    while instant.astimezone(ZoneInfo(zone)).replace(tzinfo=None) < wanted:
        instant += timedelta(minutes=1)
    return instant
