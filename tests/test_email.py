"""E-mail: what a mail looks like, what no text can do to it, and what becomes of one that is not taken."""

import asyncio
import contextlib
import json
import time
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import (
    DROP,
    HANG,
    LOSE,
    Mailbox,
    deliver,
    line,
    outbound_settings,
    outgoing,
    running,
    wait_until,
)  # fmt: skip

import app

ALICE = {"email": "alice@example.org"}
LANGUAGES = sorted(app.WORDS)
HEADERS = [
    "Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "List-Unsubscribe",
    "List-Unsubscribe-Post", "MIME-Version", "Content-Type",
]  # fmt: skip
NASTY = [
    "a\r\nBcc: eve@example.org", "=?utf-8?q?a=0ABcc:_eve=40example.org?=", "a\n\n<script>",
    "\u2028Bcc: eve@example.org", "=?utf-8?b?DQpCY2M6IGV2ZQ==?= =?utf-8?b?DQo=?=", "\x00\x1b[2J",
    "\u202egnp.exe", " \t ", "x" * 200, "क" * 200, "\ud800", "Subject: again", "a =?=?utf-8?q?=0a?==",
    "😀 " * 66,
]  # fmt: skip


def mail(**changes: Any) -> app.Outgoing:
    return outgoing("email", ALICE, **changes)


# ─── What it looks like ───


def test_one_item_is_a_mail_that_says_it_and_links_to_it(mailbox: Mailbox, tmp_path: Path) -> None:
    item = line("Invoice 42 is overdue", "critical")
    message = outgoing("email", ALICE, item)
    assert deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), message) == [app.Outcome("sent")]
    [letter] = mailbox.messages
    assert letter.sender == "bell@example.org"
    assert letter.recipients == ["alice@example.org"]
    assert letter.subject == "Invoice 42 is overdue"
    for part in (letter.text, letter.html):
        assert "Invoice 42 is overdue" in part
        assert part.count(f"https://bell.example.org/n/{item.id}") == 1
        assert "https://bell.example.org/preferences" in part
        assert "https://bell.example.org/unsubscribe/" in part


def test_several_items_are_a_digest_with_a_link_each(mailbox: Mailbox, tmp_path: Path) -> None:
    items = [line(f"Comment {number}") for number in range(10)]
    deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), outgoing("email", ALICE, *items))
    [letter] = mailbox.messages
    assert letter.subject == "10 notifications"
    for part in (letter.text, letter.html):
        assert [f"/n/{item.id}" in part for item in items] == [True] * 10
        assert [part.index(f"Comment {number}") for number in range(10)] == sorted(
            part.index(f"Comment {number}") for number in range(10)
        )
        assert "more" not in part


def test_a_long_digest_counts_what_it_does_not_show(mailbox: Mailbox, tmp_path: Path) -> None:
    items = [line(f"Comment {number}") for number in range(10)]
    deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), outgoing("email", ALICE, *items, total=95))
    [letter] = mailbox.messages
    assert letter.subject == "95 notifications"
    assert "and 85 more: https://bell.example.org/\n" in letter.text
    assert 'href="https://bell.example.org/"' in letter.html
    assert "and 85 more" in letter.html


def test_a_mail_has_exactly_these_headers(tmp_path: Path) -> None:
    message = mail()
    parsed = message_from_bytes(app.Outbound(outbound_settings(tmp_path)).compose(message))
    assert parsed.keys() == HEADERS
    assert parsed["From"] == "Bellhop <bell@example.org>"
    assert parsed["To"] == "alice@example.org"
    assert parsed["Date"] == "Wed, 04 Mar 2026 12:00:00 +0000"
    assert parsed["Message-ID"] == f"<{message.id}@example.org>"
    assert parsed["Auto-Submitted"] == "auto-generated"
    assert parsed["List-Unsubscribe"].startswith("<https://bell.example.org/unsubscribe/")
    assert parsed["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert parsed.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in parsed.walk()][1:] == ["text/plain", "text/html"]


@pytest.mark.parametrize(
    ("sender", "shown"),
    [
        ("bell@example.org", ""), ("Bell <bell@example.org>", "Bell"), ("Acme Inc. <bell@example.org>", "Acme Inc."),
        ("Bjørn Glöckner <bell@example.org>", "Bjørn Glöckner"), ("<bell@example.org>", ""),
        ('"Bjørn, Glöckner" <bell@example.org>', "Bjørn, Glöckner"), ('"Acme, Inc." <bell@example.org>', "Acme, Inc."),
        ("Müller GmbH & Co. KG <bell@example.org>", "Müller GmbH & Co. KG"), ("日本 <bell@example.org>", "日本"),
    ],
)  # fmt: skip
def test_a_sender_that_is_taken_is_shown_as_it_was_written(sender: str, shown: str, tmp_path: Path) -> None:
    outbound = app.Outbound(outbound_settings(tmp_path, mail_from=sender))
    parsed = message_from_bytes(outbound.compose(mail()), policy=policy.default)
    [address] = parsed["From"].addresses
    assert (
        (address.display_name, address.addr_spec) == (shown, "bell@example.org") == (shown, outbound.sender)
    )
    assert parsed["Message-ID"].endswith("@example.org>")


@pytest.mark.parametrize("text", ["x" * 200, "€ " * 100, "알" * 200, "word " * 40, "😀" * 200])
def test_lines_are_no_longer_than_mail_allows(text: str, tmp_path: Path) -> None:
    """RFC 2045: 76 characters; RFC 2047: 75 for an encoded word, in a line of 76. Other fields stay whole."""
    ids = {"user_id": "알" * 160, "event_name": "이" * 120}
    outbound = app.Outbound(outbound_settings(tmp_path))
    for message in (mail(**ids), outgoing("email", ALICE, *[line(text)] * 10, total=12, **ids)):
        message.lines = [line(text)] * len(message.lines)
        raw = outbound.compose(message)
        head, _, parts = raw.partition(b"\r\n\r\n")
        if not text.isascii():
            assert max(map(len, head.partition(b"\r\nFrom:")[0].split(b"\r\n"))) <= 76
        assert max(map(len, parts.split(b"\r\n"))) <= 78
        parsed = message_from_bytes(raw, policy=policy.default)
        assert parsed["Subject"] == ("12 notifications" if message.total > 1 else text.strip()[:200].strip())
        link = str(parsed["List-Unsubscribe"])
        assert link.startswith("<https://") and link.endswith(">") and b"List-Unsubscribe: <https" in raw
        assert message.lines[0].text.strip() in parsed.get_body(("plain",)).get_content()


def test_a_retried_mail_has_the_same_identity(tmp_path: Path) -> None:
    outbound, message = app.Outbound(outbound_settings(tmp_path)), mail()
    first, second = (message_from_bytes(outbound.compose(message)) for _ in range(2))
    for name in ("Message-ID", "Date", "Subject", "List-Unsubscribe"):
        assert first[name] == second[name]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_mail_speaks_the_readers_language(language: str, tmp_path: Path) -> None:
    outbound, words = app.Outbound(outbound_settings(tmp_path)), app.WORDS[language]
    single = outbound.compose(outgoing("email", ALICE, line(None), locale=f"{language}-XX"))
    digest = outbound.compose(outgoing("email", ALICE, line(), line(), locale=language.upper()))
    single_mail, digest_mail = (message_from_bytes(raw, policy=policy.default) for raw in (single, digest))
    assert single_mail["Subject"] == words["message.private"]
    assert digest_mail["Subject"] == words["message.digest"].format(count=2)
    text = digest_mail.get_body(("plain",)).get_content()
    assert f"{words['message.severity.warning']}: Invoice 42 is overdue" in text
    assert words["message.unsubscribe"] in text


def test_every_language_has_the_same_words_for_what_leaves() -> None:
    for language in LANGUAGES:
        words = {name: text for name, text in app.WORDS[language].items() if name.startswith("message.")}
        assert words.keys() == {name for name in app.WORDS["en"] if name.startswith("message.")}, language
        assert "{count}" in words["message.digest"], language
        assert "{count}" in words["message.more"], language


def test_a_language_nobody_translated_is_answered_in_english(tmp_path: Path) -> None:
    raw = app.Outbound(outbound_settings(tmp_path)).compose(
        outgoing("email", ALICE, line(None), locale="tlh")
    )
    assert message_from_bytes(raw)["Subject"] == "You have a new notification"


def test_markup_in_a_text_stays_text(tmp_path: Path) -> None:
    raw = app.Outbound(outbound_settings(tmp_path)).compose(outgoing("email", ALICE, line("<b>&amp;</b>")))
    parsed = message_from_bytes(raw, policy=policy.default)
    assert "<b>" not in parsed.get_body(("html",)).get_content()
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in parsed.get_body(("html",)).get_content()
    assert "<b>&amp;</b>" in parsed.get_body(("plain",)).get_content()


# ─── What no text can do ───

ANY_TEXT = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=200),
    st.text(st.sampled_from("=?utf-8qb_\r\n\t :<>@,;\"'\\\x00é😀"), max_size=200),
    st.lists(st.sampled_from([*NASTY, "\r", "\n", ": ", "Bcc"]), max_size=6)
    .map("".join)
    .map(lambda text: text[:200]),
)


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=10), user=ANY_TEXT, event=ANY_TEXT, digest=st.booleans())
def test_no_text_adds_or_ends_a_header(
    outbound: app.Outbound, texts: list[str], user: str, event: str, digest: bool
) -> None:
    user, event = (text.encode("utf-8", "replace").decode() for text in (user, event))
    lines = [line(text, event_name=event) for text in texts]
    message = outgoing("email", ALICE, *lines[: None if digest else 1], user_id=user)
    raw = outbound.compose(message)
    parsed = message_from_bytes(raw)
    assert parsed.keys() == HEADERS
    assert not parsed.defects
    head = raw.partition(b"\r\n\r\n")[0]
    assert [row for row in head.split(b"\r\n") if not row.startswith((b" ", b"\t"))] == [
        row for row in head.split(b"\r\n") if row.partition(b":")[0].decode() in HEADERS
    ]
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert b"\n" not in raw.replace(b"\r\n", b"") and raw.isascii()
    if not digest:
        decoded = message_from_bytes(raw, policy=policy.default)["Subject"]
        said = app.one_line(texts[0]) or "You have a new notification"
        assert "".join(decoded.split()) == "".join(said.replace("=?", "= ?").split())


@pytest.fixture(scope="module")
def outbound(tmp_path_factory: pytest.TempPathFactory) -> app.Outbound:
    return app.Outbound(outbound_settings(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize(
    "address",
    [
        "alice@example.org\r\nBcc: eve@example.org", "alice@example.org> SIZE=1", "a@b, eve@example.org",
        "alice", "", "@", "alice@", "a b@example.org", "älice@example.org", "alice@exam\u0000ple.org",
        "<alice@example.org>", "a@b@c d",
    ],
)  # fmt: skip
def test_an_address_that_is_none_bounces_without_a_connection(
    mailbox: Mailbox, tmp_path: Path, address: str
) -> None:
    message = outgoing("email", {"email": address})
    [outcome] = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), message)
    assert outcome.verdict == "bounced"
    assert mailbox.connections == 0


# ─── What becomes of a mail that is not taken ───


@pytest.mark.parametrize(
    ("place", "answer", "verdict"),
    [
        ("GREETING", "421 4.3.2 busy", "retry"),
        ("GREETING", "554 5.3.2 no service here", "fault"),
        ("GREETING", DROP, "fault"),
        ("GREETING", HANG, "fault"),
        ("EHLO", DROP, "fault"),
        ("EHLO", HANG, "fault"),
        ("MAIL", "451 4.3.0 later", "retry"),
        ("MAIL", "550 5.1.0 sender unknown", "dead"),
        ("MAIL", DROP, "retry"),
        ("MAIL", HANG, "retry"),
        ("RCPT", "450 4.2.1 greylisted", "retry"),
        ("RCPT", "550 5.1.1 nobody of that name", "bounced"),
        ("RCPT", DROP, "retry"),
        ("RCPT", HANG, "retry"),
        ("DATA", "452 4.3.1 disk full", "retry"),
        ("DATA", "421 4.3.2 going down", "retry"),
        ("DATA", "554 5.7.1 that is spam", "dead"),
        ("DATA", DROP, "retry"),
        ("DATA", HANG, "retry"),
        ("DATA", LOSE, "retry"),
    ],
)
def test_what_a_failure_means_depends_on_where_it_happens(
    mailbox: Mailbox, tmp_path: Path, place: str, answer: str, verdict: str
) -> None:
    mailbox.script(place, answer)
    started = time.monotonic()
    [outcome] = deliver(
        outbound_settings(tmp_path, smtp_url=mailbox.url, channel_timeout_seconds=1.5), mail()
    )
    assert outcome.verdict == verdict
    assert time.monotonic() - started < 2
    if answer[0].isdigit():
        assert outcome.error == answer
    assert len(mailbox.messages) == (1 if answer == LOSE else 0)


def test_a_server_that_is_not_there_is_a_fault(mailbox: Mailbox, tmp_path: Path) -> None:
    mailbox.down()
    outcomes = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), mail())
    assert [outcome.verdict for outcome in outcomes] == ["fault"]
    [nameless] = deliver(outbound_settings(tmp_path, smtp_url="smtp://nowhere.invalid"), mail())
    assert nameless.verdict == "fault"
    [unset] = deliver(outbound_settings(tmp_path), mail())
    assert unset.verdict == "fault"


def test_a_servers_words_are_kept_short_and_on_one_line(mailbox: Mailbox, tmp_path: Path) -> None:
    mailbox.script("DATA", "550-one\r\n550-two\r\n550 " + "x" * 400)
    [outcome] = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), mail())
    assert outcome.error.startswith("550 one two xxx")
    assert len(outcome.error) == 200


def test_the_log_names_the_message_and_nothing_else(
    mailbox: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: app.Outbound, message: app.Outgoing) -> bytes:
        raise RuntimeError(f"{message.address} {message.lines}")

    monkeypatch.setattr(app.Outbound, "compose", broken)
    message = mail()
    [outcome] = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), message)
    assert outcome == app.Outcome("retry", "RuntimeError")
    [record] = [record for record in caplog.records if record.name == "bellhop"]
    assert record.getMessage() == f"message {message.id}: RuntimeError"
    assert record.exc_info is None


# ─── Connections ───


def test_mails_share_a_connection(mailbox: Mailbox, tmp_path: Path) -> None:
    messages = [mail(id=uuid4()) for _ in range(20)]
    outcomes = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), *messages)
    assert {outcome.verdict for outcome in outcomes} == {"sent"}
    assert [letter.message["Message-ID"] for letter in mailbox.messages] == [
        f"<{message.id}@example.org>" for message in messages
    ]
    assert mailbox.connections == 1


def test_mails_at_once_are_each_sent_once(mailbox: Mailbox, tmp_path: Path) -> None:
    messages = [mail(id=uuid4()) for _ in range(30)]
    outcomes = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), *messages, together=True)
    assert {outcome.verdict for outcome in outcomes} == {"sent"}
    assert sorted(letter.message["Message-ID"] for letter in mailbox.messages) == sorted(
        f"<{message.id}@example.org>" for message in messages
    )


@pytest.mark.parametrize("answer", ["421 4.4.2 idle for too long", "550 5.5.1 no", DROP, HANG])
def test_a_stale_connection_is_replaced_before_anything_is_sent(
    mailbox: Mailbox, tmp_path: Path, answer: str
) -> None:
    mailbox.script("RSET", answer)
    outcomes = deliver(
        outbound_settings(tmp_path, smtp_url=mailbox.url, channel_timeout_seconds=2), mail(), mail()
    )
    assert [outcome.verdict for outcome in outcomes] == ["sent", "sent"]
    assert len(mailbox.messages) == 2
    assert mailbox.connections == 2


def test_a_connection_the_server_closed_is_replaced(mailbox: Mailbox, tmp_path: Path) -> None:
    async def work() -> list[str]:
        outbound = app.Outbound(outbound_settings(tmp_path, smtp_url=mailbox.url))
        await outbound.open()
        verdicts = [(await outbound.send(mail())).verdict]
        await asyncio.to_thread(mailbox.down)
        verdicts.append((await outbound.send(mail())).verdict)
        await asyncio.to_thread(mailbox.up)
        verdicts.append((await outbound.send(mail())).verdict)
        await outbound.close()
        return verdicts

    assert asyncio.run(work()) == ["sent", "fault", "sent"]
    assert len(mailbox.messages) == 2


def test_an_idle_connection_is_hung_up(
    mailbox: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAIL_IDLE", 0.05)

    async def work() -> None:
        outbound = app.Outbound(outbound_settings(tmp_path, smtp_url=mailbox.url))
        await outbound.open()
        await outbound.send(mail())
        assert len(mailbox.open) == 1
        await asyncio.to_thread(wait_until, lambda: not mailbox.open)
        assert (await outbound.send(mail())).verdict == "sent"
        await outbound.close()

    asyncio.run(work())
    assert mailbox.connections == 2


def test_a_cancelled_send_leaves_no_connection_behind(mailbox: Mailbox, tmp_path: Path) -> None:
    mailbox.script("RCPT", HANG)

    async def work() -> None:
        outbound = app.Outbound(outbound_settings(tmp_path, smtp_url=mailbox.url))
        await outbound.open()
        task = asyncio.create_task(outbound.send(mail()))
        await asyncio.to_thread(wait_until, lambda: mailbox.connections)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: not mailbox.open)
        await outbound.close()

    asyncio.run(work())


# ─── TLS and login ───


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_a_login_is_used_over_tls(tls: str, tmp_path: Path) -> None:
    with running(Mailbox(tls, ("bell@example.org", "p@ss:w/ord%"))) as mailbox:
        url = mailbox.url.replace("bell@example.org:p@ss:w/ord%", "bell%40example.org:p%40ss%3Aw%2Ford%25")
        config = outbound_settings(tmp_path, smtp_url=url)
        outcomes = deliver(config, mail(), mail(), trust=mailbox.certificate)
        assert [outcome.verdict for outcome in outcomes] == ["sent", "sent"]
        assert [(letter.user, letter.encrypted) for letter in mailbox.messages] == [
            ("bell@example.org", True)
        ] * 2
        assert mailbox.connections == 1


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_a_certificate_nobody_trusts_is_a_fault(tls: str, tmp_path: Path) -> None:
    with running(Mailbox(tls)) as mailbox:
        [outcome] = deliver(outbound_settings(tmp_path, smtp_url=mailbox.url), mail())
        assert outcome.verdict == "fault"
        assert not mailbox.messages


def test_a_wrong_password_is_a_fault(tmp_path: Path) -> None:
    with running(Mailbox("starttls", ("bell", "right"))) as mailbox:
        config = outbound_settings(tmp_path, smtp_url=mailbox.url.replace("right", "wrong"))
        [outcome] = deliver(config, mail(), trust=mailbox.certificate)
        assert outcome.verdict == "fault"
        assert outcome.error.startswith("535")
        assert "wrong" not in outcome.error


def test_starttls_can_be_required_and_switched_off(mailbox: Mailbox, tmp_path: Path) -> None:
    required = outbound_settings(tmp_path, smtp_url=mailbox.url + "?starttls=required")
    assert deliver(required, mail())[0].verdict == "fault"
    with running(Mailbox("starttls")) as secure:
        switched_off = outbound_settings(tmp_path, smtp_url=secure.url + "?starttls=off")
        assert deliver(switched_off, mail())[0].verdict == "sent"
        assert secure.messages[0].encrypted is False


@pytest.mark.parametrize(
    "url",
    [
        "http://mail.example.org",
        "smtp://",
        "smtp://mail?starttls=maybe",
        "mail.example.org",
        "smtp://mail:99999",
    ],
)
def test_a_mail_server_that_is_no_address_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError):
        app.smtp_arguments(url)


def test_the_usual_ports_are_filled_in() -> None:
    assert app.smtp_arguments("smtp://mail.example.org")["port"] == 587
    assert app.smtp_arguments("smtps://mail.example.org")["port"] == 465
    assert app.smtp_arguments("smtp://[::1]:2525")["hostname"] == "::1"


# ─── Unsubscribing ───


def sign(user: str, event: str | None) -> str:
    """A token as a mail's link carries it."""
    return app.jwt.encode({"sub": user, "event": event}, app.derive("s" * 32, "unsubscribe"), "HS256")


def read_unsubscribe(secret: str, token: str) -> tuple[str, str | None] | None:
    """Whom and which event a link names; None when it was not signed with this secret."""
    gate = app.Gatekeeper(app.Settings(secret=secret), cast("app.Db", None))
    with contextlib.suppress(app.Problem):
        _, user, claims = gate.read_token(token, "unsubscribe")
        return user, claims["event"]
    return None


def test_an_unsubscribe_token_names_the_user_and_the_event() -> None:
    for user, event in [("alice", None), ("älice@example.org", "comment.created"), ("a" * 200, "e" * 120)]:
        token = sign(user, event)
        assert read_unsubscribe("s" * 32, token) == (user, event)
        assert all(character.isalnum() or character in "-_." for character in token)


def test_a_token_signed_elsewhere_is_worthless() -> None:
    token = sign("alice", None)
    head, payload, signature = token.split(".")
    forged = app.base64url_encode(json.dumps({"sub": "bob", "event": None}).encode()).decode()
    unsigned = app.base64url_encode(b'{"alg":"none"}').decode()
    for other in (
        f"{head}.{forged}.{signature}",
        f"{unsigned}.{payload}.",
        token[:-4],
        "",
        "a.b.c",
        "é",
        "." * 500,
    ):
        assert read_unsubscribe("s" * 32, other) is None
    assert read_unsubscribe("t" * 32, token) is None
    assert (
        read_unsubscribe("s" * 32, app.jwt.encode({"sub": "alice", "event": None}, "s" * 32, "HS256")) is None
    )


def test_the_link_in_a_mail_carries_such_a_token(tmp_path: Path) -> None:
    config = outbound_settings(tmp_path)
    for lines, event in [((line(),), "invoice.overdue"), ((line(), line()), None)]:
        raw = app.Outbound(config).compose(outgoing("email", ALICE, *lines))
        parsed = message_from_bytes(raw, policy=policy.default)
        link = parsed["List-Unsubscribe"].strip("<>")
        assert read_unsubscribe(config.secret, link.rpartition("/")[2]) == ("alice", event)
        for kind in ("plain", "html"):
            assert parsed.get_body((kind,)).get_content().count(link) == 1, "the link in the text is another"
