"""Web Push: encrypted for one browser (RFC 8291), signed by this service (RFC 8292), sent once."""

import json
import re
import stat
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import http_ece
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import (
    DROP,
    HANG,
    NOON,
    Pushbox,
    deliver,
    from_base64url,
    line,
    outbound_settings,
    outgoing,
    to_base64url,
)  # fmt: skip

import app

# RFC 8291, appendix A
PLAIN = b"When I grow up, I want to be a watermelon"
SENDER_KEY = "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw"
READER_POINT = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
READER_AUTH = "BTBZMqHH6r4Tts7J_aSIgg"
SALT = "DGv6ra1nlYgDCS1FRnbzlw"
SEALED = "".join(
    [
        "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK",
        "6PBru3jl7A_yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN",
    ]
)


def private_key(text: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(from_base64url(text)), ec.SECP256R1())


def test_the_vector_of_the_standard_is_met() -> None:
    reader, auth = from_base64url(READER_POINT), from_base64url(READER_AUTH)
    sealed = app.seal_push(PLAIN, reader, auth, from_base64url(SALT), private_key(SENDER_KEY))
    assert to_base64url(sealed) == SEALED


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=3000))
def test_whatever_is_sealed_is_opened_by_its_browser_alone(text: bytes) -> None:
    key, auth = ec.generate_private_key(ec.SECP256R1()), uuid4().bytes
    sealed = app.seal_push(text, app.point(key), auth)
    assert http_ece.decrypt(sealed, private_key=key, auth_secret=auth, version="aes128gcm") == text
    with pytest.raises(http_ece.ECEException):
        http_ece.decrypt(sealed, private_key=key, auth_secret=uuid4().bytes, version="aes128gcm")


def test_no_two_messages_share_salt_or_key(pushbox: Pushbox, tmp_path: Path) -> None:
    address, item = pushbox.subscription().address(), line()
    deliver(outbound_settings(tmp_path), *[outgoing("push", address, item) for _ in range(5)])
    assert len({hit.body[:16] for hit in pushbox.requests}) == 5
    assert len({hit.body[21:86] for hit in pushbox.requests}) == 5


# ─── What the browser gets ───


@pytest.mark.parametrize(
    ("severity", "urgency"),
    [("critical", "high"), ("warning", "normal"), ("success", "low"), ("info", "low")],
)
def test_one_item_is_pushed_as_itself(pushbox: Pushbox, tmp_path: Path, severity: str, urgency: str) -> None:
    item = line("Rechnung 42 ist überfällig 🧾", severity)
    message = outgoing("push", pushbox.subscription().address(), item)
    assert deliver(outbound_settings(tmp_path), message) == [app.Outcome("sent")]
    assert pushbox.messages == [
        {
            "id": str(item.id),
            "title": "Rechnung 42 ist überfällig 🧾",
            "url": f"https://bell.example.org/n/{item.id}",
            "tag": str(item.id),
            "severity": severity,
        }
    ]
    [hit] = pushbox.taken
    assert hit.headers["Urgency"] == urgency
    assert hit.headers["Content-Encoding"] == "aes128gcm"
    assert 0 < int(hit.headers["TTL"]) <= 2_419_200


def test_several_items_are_one_push_that_replaces_the_last(pushbox: Pushbox, tmp_path: Path) -> None:
    oldest, newest = NOON, NOON.replace(hour=13)
    items = [line("worst", "critical", created_at=oldest), line("last", "info", created_at=newest)]
    address = pushbox.subscription().address()
    first, second = (outgoing("push", address, *items, id=uuid4(), total=95) for _ in range(2))
    other = outgoing("push", address, *items, user_id="bob")
    deliver(outbound_settings(tmp_path), first, second, other)
    assert pushbox.messages[0] == {
        "id": str(items[1].id),
        "title": "95 notifications",
        "url": "https://bell.example.org/",
        "tag": pushbox.messages[1]["tag"],
        "severity": "critical",
    }
    topics = [hit.headers["Topic"] for hit in pushbox.taken]
    assert topics[0] == topics[1] != topics[2]
    assert pushbox.taken[0].headers["Urgency"] == "high"


def test_a_topic_is_the_messages_own_and_survives_a_retry(pushbox: Pushbox, tmp_path: Path) -> None:
    address = pushbox.subscription().address()
    message, other = outgoing("push", address), outgoing("push", address, id=uuid4())
    pushbox.script("/push/1", 503)
    outcomes = deliver(outbound_settings(tmp_path), message, message, other)
    assert [outcome.verdict for outcome in outcomes] == ["retry", "sent", "sent"]
    topics = [hit.headers["Topic"] for hit in pushbox.requests]
    assert topics[0] == topics[1] != topics[2]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{32}", topic) for topic in topics)


def test_a_private_item_is_announced_in_the_readers_language(pushbox: Pushbox, tmp_path: Path) -> None:
    message = outgoing("push", pushbox.subscription().address(), line(None), locale="hi")
    deliver(outbound_settings(tmp_path), message)
    assert pushbox.messages[0]["title"] == app.WORDS["hi"]["message.private"]


def test_the_longest_text_fits_into_one_record(pushbox: Pushbox, tmp_path: Path) -> None:
    for text in ("🧾" * 200, '"' * 200, "\\" * 200):
        deliver(outbound_settings(tmp_path), outgoing("push", pushbox.subscription().address(), line(text)))
        assert pushbox.messages[-1]["title"] == text
    assert not pushbox.faults


# ─── Who signs ───


def test_a_key_is_made_once_and_kept_for_its_owner_alone(tmp_path: Path) -> None:
    first = app.Outbound(outbound_settings(tmp_path)).public_key
    assert app.Outbound(outbound_settings(tmp_path)).public_key == first
    assert stat.S_IMODE((tmp_path / "vapid.pem").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["vapid.pem"]
    point = from_base64url(first)
    assert (len(point), point[0]) == (65, 4)


def test_a_key_may_be_given(pushbox: Pushbox, tmp_path: Path) -> None:
    key = private_key(SENDER_KEY)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for given_key in (SENDER_KEY, pem, f"{SENDER_KEY}=\n"):
        config = outbound_settings(tmp_path, vapid_private_key=given_key)
        assert app.Outbound(config).public_key == to_base64url(app.point(key))
        message = outgoing("push", pushbox.subscription().address())
        assert deliver(config, message)[0].verdict == "sent"
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    wrong_curve = ec.generate_private_key(ec.SECP384R1())
    pem = wrong_curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for given_key in (
        pem,
        "-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----",
        "AA",
        "é",
        "!",
    ):
        with pytest.raises(ValueError):
            app.load_vapid(outbound_settings(tmp_path, vapid_private_key=given_key))


def test_one_token_serves_an_origin_for_hours(
    pushbox: Pushbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = outbound_settings(tmp_path)
    deliver(config, *[outgoing("push", pushbox.subscription().address()) for _ in range(3)])
    tokens = {hit.headers["Authorization"] for hit in pushbox.taken}
    assert len(tokens) == 1
    header = tokens.pop()
    assert re.fullmatch(r"vapid t=[\w-]+\.[\w-]+\.[\w-]+,k=[\w-]{87}", header)
    claims: dict[str, Any] = jwt.decode(header[8:].partition(",")[0], options={"verify_signature": False})
    assert claims["aud"] == pushbox.url
    assert claims["sub"] == "mailto:bell@example.org"
    assert 3600 * 5 < claims["exp"] - time.time() < 86_400
    later = time.time() + 6 * 3600
    monkeypatch.setattr(app.time, "time", lambda: later)
    deliver(config, outgoing("push", pushbox.subscription().address()))
    assert pushbox.taken[-1].headers["Authorization"] != header


# ─── What becomes of it ───


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (201, ("sent", None)),
        (200, ("sent", None)),
        (202, ("sent", None)),
        (404, ("gone", None)),
        (410, ("gone", None)),
        (413, ("dead", None)),
        (400, ("refused", None)),
        (403, ("refused", None)),
        (301, ("refused", None)),
        ((429, {"Retry-After": "120"}), ("retry", 120.0)),
        (500, ("retry", None)),
        (503, ("retry", None)),
        (DROP, ("retry", None)),
        (HANG, ("retry", None)),
    ],
)
def test_what_the_push_service_answers_decides(
    pushbox: Pushbox, tmp_path: Path, answer: Any, outcome: tuple[str, float | None]
) -> None:
    subscription = pushbox.subscription()
    pushbox.script("/push/1", answer)
    config = outbound_settings(tmp_path, channel_timeout_seconds=1.5)
    [result] = deliver(config, outgoing("push", subscription.address()))
    assert (result.verdict, result.retry_after) == outcome
    assert len(pushbox.requests) == 1
    assert not pushbox.faults


def test_a_push_service_that_is_not_there_is_a_fault(pushbox: Pushbox, tmp_path: Path) -> None:
    address = pushbox.subscription().address()
    pushbox.down()
    [result] = deliver(outbound_settings(tmp_path), outgoing("push", address))
    assert result.verdict == "fault"
    assert "/push/1" not in result.error


@pytest.mark.parametrize(
    "changes",
    [
        {"p256dh": ""},
        {"p256dh": "AAAA"},
        {"p256dh": to_base64url(b"\4" + bytes(64))},
        {"p256dh": "é" * 87},
        {"auth": ""},
        {"auth": "AAAA"},
        {"auth": to_base64url(bytes(17))},
        {"endpoint": "not an address"},
        {"endpoint": "/push/1"},
        {"endpoint": ""},
        {"endpoint": "http://[bad"},
    ],
)
def test_a_subscription_nobody_can_use_fails_at_once_but_stays(
    pushbox: Pushbox, tmp_path: Path, changes: dict[str, str]
) -> None:
    address = pushbox.subscription().address() | changes
    [result] = deliver(outbound_settings(tmp_path), outgoing("push", address))
    assert result.verdict == "dead"
    assert not pushbox.requests


def test_a_payload_has_no_other_fields(pushbox: Pushbox, tmp_path: Path) -> None:
    deliver(outbound_settings(tmp_path), outgoing("push", pushbox.subscription().address()))
    assert set(pushbox.messages[0]) == {"id", "title", "url", "tag", "severity"}
    assert "alice" not in json.dumps(pushbox.messages)
