"""Whatever is sent: a 4xx in the one shape that names what is wrong, and nothing stored."""

import json
import logging
import re
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest
from conftest import Running, app, problem, took, user_token

Json = dict[str, Any]
GOOD: Json = {"user_id": "alice", "event_name": "comment.created", "title": "A comment", "body": "Inside"}
JSON = {"Content-Type": "application/json"}
TEXTS = {  # every text of a notification and the longest it may be
    "user_id": 200, "event_name": 120, "title": 200, "body": 8000, "summary": 200, "idempotency_key": 255,
    "batch_key": 255, "subject_key": 255, "resource_id": 255,
}  # fmt: skip


@pytest.fixture
def nothing_stored(service: Running, contents: Callable[[], Json]) -> Iterator[None]:
    """The database is the same after the test as it was when the service had started."""
    before = contents()
    yield
    assert contents() == before


def post(api: httpx.Client, body: bytes, path: str = "/api/notifications") -> httpx.Response:
    return api.post(path, content=body, headers=JSON)


# ─── What is not acceptable JSON ───


@pytest.mark.usefixtures("nothing_stored")
def test_what_is_not_json_is_400(api: httpx.Client) -> None:
    good = json.dumps(GOOD)
    for body in (
        "", " ", "{", "nonsense", "[]", "5", "null", '"text"', "{'title': 1}", good + "x", good + good,
        "\ufeff" + good,
        good[:-1] + ',"data":{"n":NaN}}', good[:-1] + ',"data":{"n":Infinity}}',
        good[:-1] + ',"data":{"n":01}}',
        good[:-1] + ',"data":{"n":"\\x"}}', good[:-1] + ',"data":{"n":"a\nb"}}', good[:-1] + ",}",
    ):  # fmt: skip
        for path in ("/api/notifications", "/api/notifications/preview", "/api/notifications/batch"):
            problem(post(api, body.encode(), path), 400)
        problem(post(api, b'{"notifications": [%s, %s]}' % (good.encode(), body.encode())
                     if body.strip() else b"", "/api/notifications/batch"), 400)  # fmt: skip


@pytest.mark.usefixtures("nothing_stored")
def test_bad_utf8_is_400_wherever_it_stands(api: httpx.Client) -> None:
    for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"):
        for field in (*TEXTS, "target_url"):
            body = json.dumps(GOOD | {field: "/@"}).encode().replace(b"@", bad)
            problem(post(api, body), 400)
        for data in (b'{"a": "@"}', b'{"@": 1}'):
            body = json.dumps(GOOD).encode()[:-1] + b', "data": ' + data.replace(b"@", bad) + b"}"
            problem(post(api, body), 400)


@pytest.mark.usefixtures("nothing_stored")
def test_nul_and_lone_surrogates_are_400_in_any_text(api: httpx.Client, alice: httpx.Client) -> None:
    for bad in ("\\u0000", "\\ud800", "\\udc00x", "\\ud83dx", "\\udc00\\ud800", "\\\\\\u0000"):
        for field in (*TEXTS, "target_url"):
            body = json.dumps(GOOD | {field: "/@"}).replace("@", bad)
            problem(post(api, body.encode()), 400)
        for data in ('{"a": "@"}', '{"@": 1}', '{"a": [{"b": "@"}]}'):
            problem(
                post(api, (json.dumps(GOOD)[:-1] + f', "data": {data.replace("@", bad)}}}').encode()), 400
            )
        problem(
            alice.patch("/api/preferences", content=f'{{"events": {{"{bad}": null}}}}', headers=JSON), 400
        )
        problem(post(api, f'{{"subject_key": "{bad}"}}'.encode(), "/api/resolve"), 400)
        problem(post(api, f'{{"name": "{bad}"}}'.encode(), "/api/keys"), 400)
        subscription = (
            f'{{"endpoint": "https://push.example/{bad}", "keys": {{"p256dh": "{bad}", "auth": "{bad}"}}}}'
        )
        problem(post(alice, subscription.encode(), "/api/push/subscriptions"), 400)
        gone = alice.request(
            "DELETE", "/api/push/subscriptions", content=f'{{"endpoint": "{bad}"}}', headers=JSON
        )
        problem(gone, 400)


@pytest.mark.usefixtures("nothing_stored")
def test_a_nul_is_named_with_its_place_in_a_batch(api: httpx.Client) -> None:
    for fault, field in (
        ({"title": "a\0b"}, "notifications[1].title"),
        ({"data": {"a": [{"b": "\0"}]}}, "notifications[1].data.a[0].b"),
        ({"data": {"\0": 1}}, "notifications[1].data"),
    ):
        body = json.dumps({"notifications": [GOOD, GOOD | fault]})
        problem(post(api, body.encode(), "/api/notifications/batch"), 400, field)


@pytest.mark.usefixtures("nothing_stored")
def test_what_is_no_utf8_in_a_path_a_query_or_a_header_is_400(api: httpx.Client, alice: httpx.Client) -> None:
    for bad in ("%FF", "%C3", "%ED%A0%80"):
        problem(api.put(f"/api/users/{bad}", json={"locale": "de"}), 400, "user_id")
        problem(alice.get(f"/api/notifications?event={bad}"), 400)
    reply = api.post("/api/notifications", json=GOOD, headers={"Idempotency-Key": b"\xe9"})
    problem(reply, 400, "Idempotency-Key")


@pytest.mark.usefixtures("nothing_stored")
def test_an_empty_part_of_a_path_is_not_stepped_over(api: httpx.Client) -> None:
    for path in ("/api/users//export", "/api/users//preferences", "/api//users/x", "//api/users/x"):
        for method in ("GET", "PUT", "DELETE"):
            problem(api.request(method, f"{str(api.base_url).rstrip('/')}{path}"), 404)


@pytest.mark.usefixtures("nothing_stored")
def test_numbers_count_with_all_their_digits(api: httpx.Client) -> None:
    body = json.dumps(GOOD)[:-1] + ', "data": {"n": [' + ", ".join(["1e399"] * 50) + "]}}"
    problem(post(api, body.encode()), 400, "data")


def test_a_number_that_no_float_holds_is_kept_among_many_brackets_too(api: httpx.Client, sql: Any) -> None:
    item = json.dumps(GOOD)[:-1] + ', "data": {"n": 1e399}}'
    body = f'{{"notifications": [{", ".join([item] * 40)}]}}'
    assert post(api, body.encode(), "/api/notifications/batch").status_code == 201
    assert sql("SELECT count(*) FROM notifications WHERE (data ->> 'n')::numeric = 1e399") == [(40,)]


def test_clients_that_leave_before_their_answer_leave_no_trace(
    service: Running, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    for _ in range(50):
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
    assert httpx.get(f"{service.url}/health/live").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_escaped_backslash_before_u0000_is_only_text(api: httpx.Client) -> None:
    sent = post(api, json.dumps(GOOD | {"title": "C:\\u0000", "data": {"a": "\\ud800 \\\\u0000"}}).encode())
    assert sent.status_code == 201
    assert sent.json()["notification"]["title"] == "C:\\u0000"


@pytest.mark.usefixtures("nothing_stored")
def test_nul_in_a_path_or_a_query_is_a_clear_refusal(api: httpx.Client, alice: httpx.Client) -> None:
    for path in ("/api/users/a%00b", "/api/users/a%00b/export", "/api/users/%00"):
        problem(api.get(path), 400)
    for method, path, body in (
        ("PUT", "/api/users/a%00b", {"locale": "de"}), ("DELETE", "/api/users/a%00b", None),
        ("PATCH", "/api/users/a%00b/preferences", {"locale": "de"}), ("POST", "/api/users/a%00b/token", {}),
    ):  # fmt: skip
        problem(api.request(method, path, json=body), 400)
    problem(alice.get("/api/notifications?event=a%00b"), 400)


@pytest.mark.usefixtures("nothing_stored")
def test_a_user_id_too_long_is_refused_in_a_path_too(api: httpx.Client) -> None:
    user = f"/api/users/{'x' * 201}"
    problem(api.put(user, json={"locale": "de"}), 400, "user_id")
    problem(api.patch(f"{user}/preferences", json={"locale": "de"}), 400, "user_id")
    problem(api.post(f"{user}/token", json={}), 400, "user_id")


@pytest.mark.usefixtures("nothing_stored")
def test_deeper_than_32_is_400(api: httpx.Client) -> None:
    good = json.dumps(GOOD)[:-1]
    for depth in (31, 32, 1_000, 25_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            nest = opening * depth + ("1" if opening != "[" else "") + closing * depth
            problem(post(api, f'{good}, "data": {{"x": {nest}}}}}'.encode()), 400)
            problem(post(api, f'{good}, "title": {nest}}}'.encode()), 400)
            problem(post(api, f'{good}, "unknown": {opening * depth}'.encode()), 400)
    problem(post(api, b"[" * 200_000), 400)


def test_32_deep_is_accepted_and_brackets_in_texts_do_not_count(api: httpx.Client) -> None:
    deep: Any = 1
    for _ in range(30):
        deep = [deep]
    sent = api.post("/api/notifications", json=GOOD | {"data": {"deep": deep, "text": '[{"' * 99}})
    assert sent.status_code == 201, sent.text
    assert sent.json()["notification"]["data"] == {"deep": deep, "text": '[{"' * 99}


@pytest.mark.usefixtures("nothing_stored")
def test_crafted_bodies_do_not_hold_the_service_up(api: httpx.Client) -> None:
    plain = took(lambda: problem(post(api, b'{"title":"' + b"a" * 250_000 + b'"}'), 400))
    many = b"".join(b'"k%d":1,' % number for number in range(20_000))
    for body in (
        b'{"a":' + b"[" * 40 + b'"' + b'\\"' * 120_000,
        b'{"a":' + b"[" * 40 + b'"' * 250_000,
        b'{"title":"' + b"\\\\" * 120_000,
        b'{"title":"' + b"\\" * 250_000 + b"u0000",
        b"{" + many + b'"z":1}',
        b'{"' + b"aB" * 120_000 + b'":1}',
    ):
        crafted = took(lambda body=body: problem(post(api, body), 400))
        assert crafted < 200 * plain, body[:60]  # what grows with the square takes thousands of times as long


@pytest.mark.usefixtures("nothing_stored")
def test_numbers_beyond_64_bits_are_400_outside_data(api: httpx.Client, alice: httpx.Client) -> None:
    for number in ("9223372036854775808", "-9223372036854775809", "1" * 400, "1e400", "-1e999999", "1.5"):
        for field in ("title", "private", "severity"):
            problem(post(api, (json.dumps(GOOD)[:-1] + f', "{field}": {number}}}').encode()), 400)
        problem(alice.patch("/api/preferences", content=f'{{"digest_minutes": {number}}}', headers=JSON), 400)
        problem(post(api, f'{{"minutes": {number}}}'.encode(), "/api/users/alice/token"), 400)
        problem(alice.get("/api/notifications", params={"limit": number}), 400)


def test_numbers_in_data_come_back_as_they_were(api: httpx.Client) -> None:
    data = (
        '{"big": 123456789012345678901234567890, "exact": 0.10000000000000000001, "m": 18446744073709551615}'
    )
    sent = post(api, (json.dumps(GOOD)[:-1] + f', "data": {data}}}').encode())
    assert sent.status_code == 201
    for number in ("123456789012345678901234567890", "0.10000000000000000001", "18446744073709551615"):
        assert number in sent.text
    text = '{"said": "1e5000 and \\"1e9999"}'
    assert post(api, (json.dumps(GOOD)[:-1] + f', "data": {text}}}').encode()).status_code == 201
    for number in (
        "1e999999",
        "1e400",
        "-1.5E+0401",
        "1e-5000",
        "9" * 400,
    ):  # each would be as many digits long
        told = post(api, (json.dumps(GOOD)[:-1] + f', "data": {{"n": [{number}]}}}}').encode())
        problem(told, 400, "data")


# ─── What the fields refuse ───


@pytest.mark.usefixtures("nothing_stored")
def test_a_missing_field_is_named(api: httpx.Client) -> None:
    for field in ("event_name", "title", "body", "user_id"):
        body = {name: value for name, value in GOOD.items() if name != field}
        assert problem(api.post("/api/notifications", json=body), 400, field)["code"] == "invalid"
        batch = {"notifications": [GOOD, GOOD, body]}
        problem(api.post("/api/notifications/batch", json=batch), 400, f"notifications[2].{field}")


@pytest.mark.usefixtures("nothing_stored")
def test_a_mistyped_field_is_named(api: httpx.Client) -> None:
    wrong: list[Any] = [5, 1.5, True, [], {}, ["a"], {"a": 1}]
    cases = [(field, value) for field in (*TEXTS, "target_url") for value in wrong]
    cases += [(field, None) for field in ("event_name", "title", "body")]
    cases += [("severity", value) for value in [*wrong, "fatal", "", "INFO"]]
    cases += [("data", value) for value in (5, True, [], "{}", [{}], None)]
    cases += [("private", value) for value in (0, 1, "true", "", [], {}, None)]
    cases += [("user_ids", value) for value in ("alice", 5, {})]
    cases += [("deliver_at", value) for value in (5, "tomorrow", "2030-01-01", "2030-01-01T00:00:00", "")]
    for field, value in cases:
        body = {name: kept for name, kept in GOOD.items() if field != "user_ids" or name != "user_id"}
        reply = api.post("/api/notifications", json=body | {field: value})
        problem(reply, 400, field)
        camel = "".join(part.capitalize() if at else part for at, part in enumerate(field.split("_")))
        if camel != field:
            body.pop(field, None)
            problem(api.post("/api/notifications", json=body | {camel: value}), 400, field)


@pytest.mark.usefixtures("nothing_stored")
def test_an_unknown_field_is_named_in_every_body(api: httpx.Client, alice: httpx.Client) -> None:
    problem(api.post("/api/notifications", json=GOOD | {"titel": "x"}), 400, "titel")
    problem(api.post("/api/notifications", json=GOOD | {"read_at": None}), 400, "read_at")
    problem(api.post("/api/notifications", json=GOOD | {"readAt": None}), 400, "readAt")
    for method, path, body, one in (
        ("POST", "/api/notifications/preview", GOOD, api),
        ("POST", "/api/resolve", {"subject_key": "x"}, api),
        ("PUT", "/api/users/alice", {"locale": "de"}, api), ("POST", "/api/keys", {"name": "x"}, api),
        ("PATCH", "/api/users/alice/preferences", {"locale": "de"}, api),
        ("POST", "/api/users/alice/token", {"minutes": 5}, api),
        ("PATCH", "/api/preferences", {"locale": "de"}, alice),
        ("PATCH", "/api/notifications", {"all": True}, alice),
        ("PATCH", f"/api/notifications/{uuid4()}", {"read": True}, alice),
        ("DELETE", "/api/push/subscriptions", {"endpoint": "x"}, alice),
    ):  # fmt: skip
        problem(one.request(method, path, json=body | {"surprise": 1}), 400, "surprise")
    for field in ("surprise", "aSurprise"):
        batch = {"notifications": [GOOD, GOOD | {field: 1}]}
        problem(api.post("/api/notifications/batch", json=batch), 400, f"notifications[1].{field}")
    problem(
        api.post("/api/notifications/batch", json={"notifications": [GOOD], "surprise": 1}), 400, "surprise"
    )
    problem(alice.patch("/api/preferences", json={"events": {"a": {"fax": True}}}), 400)


@pytest.mark.usefixtures("nothing_stored")
def test_a_field_given_in_both_spellings_is_refused(api: httpx.Client) -> None:
    twice = GOOD | {"eventName": "other"}
    problem(api.post("/api/notifications", json=twice), 400, "event_name")
    batch = {"notifications": [GOOD, twice]}
    problem(api.post("/api/notifications/batch", json=batch), 400, "notifications[1].event_name")


@pytest.mark.usefixtures("nothing_stored")
def test_a_text_too_long_is_named(api: httpx.Client) -> None:
    for field, longest in TEXTS.items():
        for character in ("x", "é", "🔔"):
            reply = api.post("/api/notifications", json=GOOD | {field: character * (longest + 1)})
            problem(reply, 400, field)
    problem(api.post("/api/notifications", json=GOOD | {"target_url": "/" + "x" * 2000}), 400, "target_url")
    problem(api.post("/api/notifications", json=GOOD | {"data": {"a": "x" * 16 * 1024}}), 400, "data")
    for field in (
        "user_id",
        "event_name",
        "title",
        "idempotency_key",
        "batch_key",
        "subject_key",
        "resource_id",
    ):
        problem(api.post("/api/notifications", json=GOOD | {field: ""}), 400, field)
    for key in ("", "x" * 256):
        told = problem(api.post("/api/notifications", json=GOOD, headers={"Idempotency-Key": key}), 400)
        assert told["errors"][0]["field"] == "Idempotency-Key"


def test_a_text_of_just_the_longest_length_is_stored_whole(api: httpx.Client) -> None:
    """Four bytes a character, no two alike: whatever holds an index entry holds these."""
    for character in ("x", "é", "🔔"):
        full = {
            field: "".join(chr(ord(character) + (n * 37) % 50) for n in range(size))
            for field, size in TEXTS.items()
        }
        full |= {"target_url": "/" + "x" * 1999, "data": {"a": "x" * (16 * 1024 - 20)}}
        sent = api.post("/api/notifications", json=full)
        assert sent.status_code == 201, (character, sent.text[:300])
        told = sent.json()["notification"]
        assert {field: told[field] for field in TEXTS if field != "resource_id"} == {
            field: full[field] for field in TEXTS if field != "resource_id"
        }
        del full["idempotency_key"]
        sent = api.post("/api/notifications", json=full)
        assert sent.status_code == 201, (character, sent.text[:300])


@pytest.mark.usefixtures("nothing_stored")
def test_recipients_are_one_user_or_1_to_1000(api: httpx.Client) -> None:
    base = {name: value for name, value in GOOD.items() if name != "user_id"}
    for users in ([], ["x"] * 1001, ["a", ""], ["a", None], ["a", 5]):
        reply = api.post("/api/notifications", json=base | {"user_ids": users})
        assert problem(reply, 400)["errors"][0]["field"].startswith("user_ids")
    problem(api.post("/api/notifications", json=GOOD | {"user_ids": ["bob"]}), 400)
    for many in ([], [GOOD] * 1001, None, {}, "x", [GOOD, 5], [GOOD, None], [GOOD, []], [5]):
        reply = api.post("/api/notifications/batch", json={"notifications": many})
        told = problem(reply, 400)
        assert told["errors"][0]["field"].startswith("notifications"), told
        if isinstance(many, list) and len(many) == 2:
            assert told["errors"][0]["field"].startswith("notifications[1]"), told
    nested = base | {"user_ids": ["bob"]}
    told = problem(api.post("/api/notifications/batch", json={"notifications": [GOOD, nested]}), 400)
    assert told["errors"][0]["field"].startswith("notifications[1].")


GOOD_URLS = [
    "https://example.com", "http://example.com/a?b=c#d", "HTTPS://EXAMPLE.com:8443/x",
    "https://[::1]:8000/x", "/", "/a/b?c=d&e=%20#f", "/a//b", "https://münchen.example/ü",
    "https://example.com/@alice", "/@alice", "/a:b", "https://example.com?x=1", "http://localhost:3000/x",
    "https://example.com/a%5Cb",
]  # fmt: skip
BAD_URLS = [
    "", " ", "javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "vbscript:x",
    "ftp://example.com/", "mailto:a@b", "//evil.example", "///evil.example", "/\\evil.example",
    "\\\\evil.example", "/a\\b", "relative", "example.com", "?x=1", "#x", "http://", "https:///x",
    "http:/example.com", "http:example.com", "https://?x", "https://#x", "https://user@example.com",
    "https://user:pw@example.com/", "https://example.com\\@evil.example",
    "https://example.com:pw@evil.example", "https://exa mple.com/", "https://example.com/a b", "/a b",
    " /a", "/a ", "/a\n", "/a\r\nX: y", "/a\tb", "\t/a", "\x01/a", "/a\x7fb", "/a\x85b", "/a\u2028b",
    "https://example.com/\x1f", "java\nscript:alert(1)", "https://@example.com", "https://:80/",
    "https://example.com:99999999/", "http://[::1", "https://example.com:x/", "/\t/evil.example",
    "/\x00/evil", "//", "/\u3000", "http:\\\\evil.example", "https:/\\evil.example",
    "blob:https://example.com/x", "file:///etc/passwd", "view-source:https://x",
]  # fmt: skip


def test_a_target_is_a_web_address_or_a_path_of_ours(api: httpx.Client, sql: Callable[..., Any]) -> None:
    for url in BAD_URLS:
        reply = api.post("/api/notifications", json=GOOD | {"target_url": url})
        assert reply.status_code == 400, url
        if "\0" not in url:
            problem(reply, 400, "target_url")
    assert sql("SELECT count(*) FROM notifications") == [(0,)]
    for url in GOOD_URLS:
        reply = api.post("/api/notifications", json=GOOD | {"target_url": url})
        assert reply.status_code == 201, (url, reply.text)
        assert reply.json()["notification"]["target_url"] == url


@pytest.mark.usefixtures("nothing_stored")
def test_queries_are_held_to_their_bounds(alice: httpx.Client) -> None:
    for name, values in {
        "limit": [
            "0",
            "101",
            "-1",
            "x",
            "",
            "1.5",
            "99999999999999999999",
            "0x10",
            " ",
            "1e1",
            "10.0",
            "\u0663",
        ],
        "cursor": ["x", "1", "00000000", str(uuid4()) + "0", "\u00e9"],
        "unread": ["x", "yes-no", "2"],
        "archived": ["x", "-1"],
        "event": ["x" * 121],
    }.items():
        for value in values:
            problem(alice.get(f"/api/notifications?{name}={quote(value)}"), 400, name)
    assert alice.get("/api/notifications?limit=1&limit=2").status_code in (200, 400)


# ─── The frame around the body ───


@pytest.mark.usefixtures("nothing_stored")
def test_other_content_types_are_415(api: httpx.Client, alice: httpx.Client) -> None:
    body = json.dumps(GOOD).encode()
    for kind in (
        "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/xml", "application/jsonx", "application/problem+json", "application/msgpack",
        "application/x-json", "json", "*/*",
    ):  # fmt: skip
        for path in ("/api/notifications", "/api/notifications/batch", "/api/notifications/preview"):
            problem(api.post(path, content=body, headers={"Content-Type": kind}), 415)
        problem(
            alice.patch("/api/notifications", content=b'{"all": true}', headers={"Content-Type": kind}), 415
        )
        problem(
            alice.patch("/api/preferences", content=b'{"locale": "de"}', headers={"Content-Type": kind}), 415
        )
        problem(api.put("/api/users/a", content=b'{"locale": "de"}', headers={"Content-Type": kind}), 415)
        wrong_login = httpx.post(
            f"{api.base_url}/login", content=b'{"token": "x"}', headers={"Content-Type": kind}
        )
        problem(wrong_login, 415)
    problem(api.post("/api/notifications", content=body), 415)


def test_json_is_taken_with_its_parameters_in_any_case(api: httpx.Client) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"):
        sent = api.post("/api/notifications", content=json.dumps(GOOD), headers={"Content-Type": kind})
        assert sent.status_code == 201, kind


def chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 16_384):
        yield body[start : start + 16_384]


def test_a_body_over_its_limit_is_413_also_in_chunks(api: httpx.Client, sql: Callable[..., Any]) -> None:
    kilo = 1024
    for path, limit, body in (
        ("/api/notifications", 256 * kilo, json.dumps(GOOD)),
        ("/api/notifications/preview", 256 * kilo, json.dumps(GOOD)),
        ("/api/resolve", 256 * kilo, '{"subject_key": "x"}'),
        ("/api/notifications/batch", 4096 * kilo, json.dumps({"notifications": [GOOD]})),
    ):
        fits = body.encode().ljust(limit)
        for content in (fits + b" ", chunks(fits + b" ")):
            problem(api.post(path, content=content, headers=JSON), 413)
        for content in (fits, chunks(fits)):
            assert api.post(path, content=content, headers=JSON).status_code in (200, 201), path
    assert sql("SELECT count(*) FROM notifications") == [(4,)]


def exchange(service: Running, request: bytes, leave: bool = True) -> bytes:
    """What the service answers to these very bytes, from a client that has no more to say."""
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), 5) as wire:
        wire.sendall(request)
        if leave:
            wire.shutdown(socket.SHUT_WR)
        parts = []
        while part := wire.recv(65536):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.usefixtures("nothing_stored")
def test_odd_requests_get_an_answer_or_are_cut_off_but_never_a_500(service: Running) -> None:
    proof = f"Host: x\r\nAuthorization: Bearer {user_token('alice')}\r\n".encode()
    typed = proof + b"Content-Type: application/json\r\n"
    for request in (
        b"POST /api/notifications HTTP/1.1\r\n" + typed + b"Content-Length: 99999999999\r\n\r\n{}",
        b"PATCH /api/notifications HTTP/1.1\r\n" + typed + b"Content-Length: 99999999999\r\n\r\n{}",
        b"PATCH /api/notifications HTTP/1.1\r\n" + typed + b"Content-Length: 5\r\n\r\n{}",
        b"PATCH /api/notifications HTTP/1.1\r\n"
        + typed
        + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"PATCH /api/notifications HTTP/1.1\r\n" + typed + b"Content-Length: -1\r\n\r\n",
        b"FOO /api/notifications HTTP/1.1\r\n" + proof + b"\r\n",
        b"TRACE /api/notifications HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /api/notifications?limit=%ff HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /api/notifications?event=%ff%fe HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /api/notifications/%ff HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /api/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /assets/x/%2e%2e%2fapp.py HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /assets/x/..%2f..%2fapp.py HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /\xff HTTP/1.1\r\n" + proof + b"\r\n",
        b"GET /api/notifications HTTP/1.1\r\n" + proof + b"Cookie: \xff=\xfe; bellhop_session=\xff\r\n\r\n",
        b"GET /api/notifications HTTP/1.1\r\nHost: x\r\nCookie: bellhop_session=\xff\xfe; ;;=\r\n\r\n",
        b"GET /api/notifications HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        b"GET /api/notifications HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer bh_\xff\xfe\r\n\r\n",
        b"GET /api/notifications HTTP/1.1\r\n" + proof + b'If-None-Match: \xff"\r\n\r\n',
        b"GET / HTTP/1.1\r\n" + proof + b"Accept-Language: \xff;q=x,,;;\r\n\r\n",
        b"GET /login HTTP/1.1\r\nHost: \xff\r\nAccept-Language: ;\r\n\r\n",
        b"GET /api/notifications HTTP/1.1\r\n" + proof + b"Accept: nonsense/;;\r\nRange: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        reply = exchange(service, request)
        status = reply.split(b" ", 2)[1:2]
        assert not reply or status[0] < b"500", (request, reply[:300])


def test_http_itself_is_spoken_as_its_rules_want(service: Running) -> None:
    get = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    last = get.replace(b"Host: x", b"Host: x\r\nConnection: close")
    options = exchange(service, last.replace(b"GET", b"OPTIONS"), leave=False).lower()
    assert options.startswith(b"http/1.1 204 ") and b"allow: get, head, options" in options
    head, _, body = exchange(service, last.replace(b"GET", b"HEAD"), leave=False).partition(b"\r\n\r\n")
    assert b"content-length: 15" in head and body == b""
    replies = exchange(service, get * 2 + last, leave=False)
    assert replies.count(b"HTTP/1.1 200 ") == replies.count(b'{"status":"ok"}') == 3
    assert replies.count(b"connection: close") == 1
    assert b"connection: close" in exchange(service, get.replace(b"HTTP/1.1", b"HTTP/1.0"), leave=False)


def test_a_path_names_all_its_methods(api: httpx.Client) -> None:
    for path in {re.sub("{.*?}", str(uuid4()), route.path) for route in app.ROUTES}:
        told = api.options(path)
        assert told.status_code == 204
        refused = problem(api.request("TRACE", path), 405) and api.request("TRACE", path)
        assert set(told.headers["allow"].split(", ")) == set(refused.headers["allow"].split(", ")), path


def test_a_body_that_nobody_reads_is_bounded_too(api: httpx.Client, alice: httpx.Client) -> None:
    for client, method, path in (
        (api, "POST", f"/api/webhooks/{uuid4()}/rotate"), (api, "DELETE", "/api/users/alice"),
        (alice, "POST", f"/api/outbox/{uuid4()}/send"), (alice, "POST", "/api/push/subscriptions"),
    ):  # fmt: skip
        reply = client.request(
            method, path, content=b" " * 300_000, headers={"Content-Type": "application/json"}
        )
        problem(reply, 413)


def test_unknown_paths_and_methods_have_the_one_shape(api: httpx.Client, service: Running) -> None:
    for path in (
        "/nowhere",
        "/api",
        "/api/nothing",
        "/api/notifications/x/y/z",
        "/api/users/",
        "/static/x",
        "/.env",
    ):
        problem(api.get(path), 404)
        problem(httpx.get(service.url + path, trust_env=False), 404)
    for method, path in (
        ("PUT", "/api/notifications"), ("DELETE", "/api/notifications"), ("POST", "/api/unread-count"),
        ("GET", "/api/resolve"), ("PATCH", "/api/users/alice"), ("POST", "/health/live"), ("DELETE", "/"),
    ):  # fmt: skip
        reply = api.request(method, path)
        assert problem(reply, 405)["code"] == "method_not_allowed"
        assert reply.headers["allow"]


@pytest.mark.usefixtures("nothing_stored")
def test_a_malformed_id_in_a_path_is_404_and_in_a_body_400(api: httpx.Client, alice: httpx.Client) -> None:
    for one in (alice, api):
        paths = one.get("/openapi.json").json()["paths"]
        for path in (path for path in paths if "{id}" in path):
            for method in paths[path]:
                for bad in ("x", "%00", f"{uuid4()}0") if one is alice else ("1",):
                    body = None if method == "get" else {}
                    problem(one.request(method, path.replace("{id}", bad), json=body), 404)
    for bad in ("1", "-", "%ff", "'", "null", "x" * 3000, "%7B%7D", "..%2f", "é"):
        problem(alice.get(f"/api/notifications/{bad}"), 404)
    for bad in ("x", "", 5, None, [], str(uuid4())[:-1]):
        problem(alice.patch("/api/notifications", json={"notification_id": bad}), 400)
        if bad is not None:
            problem(alice.patch("/api/notifications", json={"all": True, "before": bad}), 400, "before")


def test_a_fault_of_ours_is_a_500_that_tells_nothing(
    alice: httpx.Client, api: httpx.Client, sql: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    sql("ALTER TABLE notifications RENAME COLUMN title TO gone")
    for reply in (api.post("/api/notifications", json=GOOD), api.get("/api/users/alice/export")):
        if reply.status_code != 200:
            assert problem(reply, 500)["code"] == "internal"
        for word in ("column", "sql", "traceback", "psycopg", "app.py"):
            assert word not in reply.text.lower()
    sql("ALTER VIEW inbox RENAME TO gone")
    problem(alice.get("/api/notifications"), 500)
    page = alice.get("/")
    assert page.status_code == 500 and page.headers["content-type"].startswith("text/html")
    assert "Content-Security-Policy" in page.headers and "column" not in page.text
    assert "Inside" not in caplog.text and "A comment" not in caplog.text


@pytest.mark.usefixtures("nothing_stored")
def test_an_error_repeats_no_secret(service: Running, api: httpx.Client) -> None:
    marker = "Z9Z9Z9"
    for headers in (
        {"Authorization": f"Bearer bh_{marker}"},
        {"Authorization": f"Bearer {marker}.{marker}.x"},
    ):
        assert marker not in httpx.get(f"{service.url}/api/unread-count", headers=headers).text
    assert marker not in httpx.post(f"{service.url}/login", json={"token": marker}).text
    for body in ({"title": 5, "body": marker}, {"body": marker}, GOOD | {"data": marker}):
        assert marker not in api.post("/api/notifications", json=body).text


def test_no_request_turns_the_logs_of_others_on(service: Running, alice: httpx.Client) -> None:
    """At INFO, libraries write down addresses."""
    level, handlers = logging.root.level, list(logging.root.handlers)
    for path in ("/openapi.json", "/metrics", "/", "/login", "/health/ready"):
        assert alice.get(path).status_code == 200
    assert (logging.root.level, logging.root.handlers) == (level, handlers)
    assert logging.root.level >= logging.WARNING
