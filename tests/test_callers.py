"""Who may ask for what: keys, tokens, cookies, proxies, the demo header, and everybody else's things."""

import base64
import json
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
from conftest import LINK_KEY, SECRET, Running, browser, eventually, problem, user_token
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import app

Client = Callable[..., httpx.Client]
Json = dict[str, Any]
NOTE = {"event_name": "comment.created", "title": "A comment", "body": "Inside"}
SOON = int(time.time()) + 600


def pem(key: Any) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


@pytest.fixture(scope="module")
def provider() -> rsa.RSAPrivateKey:
    """The identity provider's key."""
    return rsa.generate_private_key(65537, 2048)


# ─── API keys ───


def test_without_proof_or_with_a_wrong_one_everything_is_401(service: Running, client: Client) -> None:
    wrong = [
        {}, {"Authorization": "Bearer bh_nobody"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer x"},
        {"Authorization": "Basic YTpi"}, {"Authorization": "bh_x"}, {"Cookie": "bellhop_session=x"},
        {"Authorization": "Bearer a.b.c"}, {"Authorization": "Bearer \u00e9"},
    ]  # fmt: skip
    for headers in wrong:
        asking = client(service.url)
        encoded = {name: value.encode() for name, value in headers.items()}
        for method, path in (
            ("GET", "/api/notifications"),
            ("POST", "/api/notifications"),
            ("GET", "/api/keys"),
        ):
            told = problem(asking.request(method, path, headers=encoded), 401)
            assert told["code"] == "unauthorized", headers


def test_a_send_key_cannot_reach_the_admin_api(sender: httpx.Client, api: httpx.Client) -> None:
    assert api.get("/api/keys").status_code == 200
    problem(sender.get("/api/keys"), 403)
    problem(sender.post("/api/keys", json={"name": "mine", "scope": "admin"}), 403)
    problem(sender.delete(f"/api/keys/{uuid4()}"), 403)
    assert {key["name"] for key in api.get("/api/keys").json()["keys"]} == {"admin", "send"}


def test_a_key_has_no_pages_not_even_the_admins(sender: httpx.Client, api: httpx.Client) -> None:
    for path in ("/", "/preferences", "/admin"):
        assert api.get(path).status_code == sender.get(path).status_code == 403, path


def test_a_key_names_its_recipient_and_has_no_inbox(sender: httpx.Client) -> None:
    assert sender.post("/api/notifications", json={"user_id": "alice", **NOTE}).status_code == 201
    problem(sender.post("/api/notifications", json=NOTE), 400, "user_id")
    for path in ("/api/notifications", "/api/unread-count", "/api/preferences", "/api/outbox"):
        problem(sender.get(path), 403)


def test_a_key_of_the_api_works_until_it_is_revoked(
    api: httpx.Client, service: Running, client: Client
) -> None:
    made = api.post("/api/keys", json={"name": "shop"})
    assert made.status_code == 201 and made.json()["key"]["scope"] == "send"
    secret, key_id = made.json()["secret"], made.json()["key"]["id"]
    assert secret.startswith("bh_") and secret not in api.get("/api/keys").text
    shop = client(service.url, secret)
    assert shop.post("/api/notifications", json={"user_id": "alice", **NOTE}).status_code == 201
    assert api.delete(f"/api/keys/{key_id}").status_code == 204
    problem(shop.post("/api/notifications", json={"user_id": "alice", **NOTE}), 401)
    problem(api.delete(f"/api/keys/{key_id}"), 404)


def test_a_key_revoked_elsewhere_dies_within_two_seconds(
    sender: httpx.Client, sql: Callable[..., Any]
) -> None:
    assert sender.get("/api/users/alice").status_code == 200
    sql("UPDATE api_keys SET revoked_at = now() WHERE scope = 'send'")
    eventually(lambda: sender.get("/api/users/alice").status_code == 401, seconds=2)


def test_a_key_is_kept_as_a_hash_only(api: httpx.Client, sql: Callable[..., Any]) -> None:
    secret = api.post("/api/keys", json={"name": "shop"}).json()["secret"]
    (row,) = sql("SELECT k::text FROM api_keys k WHERE name = 'shop'")
    assert secret not in row[0] and secret[3:] not in row[0]


# ─── User tokens ───


def test_a_user_token_opens_its_users_inbox_and_no_other(
    api: httpx.Client, service: Running, client: Client
) -> None:
    api.post("/api/notifications", json={"user_id": "zoë Ünal", **NOTE})
    made = api.post("/api/users/zoë Ünal/token", json={"minutes": 5})
    assert made.status_code == 201
    claims = jwt.decode(made.json()["token"], SECRET, ["HS256"])
    assert claims["sub"] == "zoë Ünal" and 280 < claims["exp"] - time.time() < 310
    assert client(service.url, made.json()["token"]).get("/api/unread-count").json() == {"unread_count": 1}
    assert client(service.url, user_token("zoe")).get("/api/unread-count").json() == {"unread_count": 0}


def test_a_users_post_is_403_whatever_it_holds(alice: httpx.Client, contents: Callable[[], Json]) -> None:
    before = contents()
    for body in (NOTE, {"user_id": "alice", **NOTE}, {}, {"bad": 1}):
        problem(alice.post("/api/notifications", json=body), 403)
    for path in ("batch", "preview"):
        problem(alice.post(f"/api/notifications/{path}", json={"user_id": "alice", **NOTE}), 403)
    assert contents() == before


def test_users_reach_neither_the_integration_nor_the_admin_api(alice: httpx.Client) -> None:
    for method, path in (
        ("GET", "/api/users/alice"), ("PUT", "/api/users/alice"), ("DELETE", "/api/users/alice"),
        ("GET", "/api/users/alice/export"), ("POST", "/api/users/alice/token"), ("POST", "/api/resolve"),
        ("PATCH", "/api/users/alice/preferences"), ("DELETE", f"/api/scheduled/{uuid4()}"),
        ("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", f"/api/keys/{uuid4()}"),
    ):  # fmt: skip
        problem(alice.request(method, path, json={} if method != "GET" else None), 403)


def unsigned(claims: Json, header: Any) -> str:
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)
    ]
    return ".".join([*parts, ""])


def test_forged_stale_and_misused_tokens_are_401(service: Running, client: Client, sign_in: Any) -> None:
    good = {"sub": "alice", "exp": SOON}
    forged = {
        "expired": jwt.encode(good | {"exp": int(time.time()) - 10}, SECRET),
        "not yet valid": jwt.encode(good | {"nbf": SOON}, SECRET),
        "without an end": jwt.encode({"sub": "alice"}, SECRET),
        "without a user": jwt.encode({"exp": SOON}, SECRET),
        "empty user": jwt.encode(good | {"sub": ""}, SECRET),
        "long user": jwt.encode(good | {"sub": "x" * 201}, SECRET),
        "NUL in the user": jwt.encode(good | {"sub": "a\0b"}, SECRET),
        "lone surrogate in the user": jwt.encode(good | {"sub": "a\ud800"}, SECRET),
        "foreign key": jwt.encode(good, "another secret that is 32 bytes or more"),
        "wrong algorithm": jwt.encode(good, SECRET * 2, "HS512"),
        "no algorithm": unsigned(good, {"alg": "none", "typ": "JWT"}),
        "no algorithm, spelled oddly": unsigned(good, {"alg": "nOnE"}),
        "algorithm of another kind": unsigned(good, {"alg": 5}),
        "header not an object": unsigned(good, []),
        "a sign-in link's token": jwt.encode(good, LINK_KEY),
        "the session cookie": sign_in("alice"),
    }
    for kind, token in forged.items():
        reply = client(service.url, token).get("/api/unread-count")
        assert reply.status_code == 401, kind
        problem(reply, 401)


def test_tampered_claims_are_401(service: Running, client: Client) -> None:
    header, _, signature = user_token("alice").split(".")
    claims = unsigned({"sub": "bob", "exp": SOON}, {}).split(".")[1]
    problem(client(service.url, f"{header}.{claims}.{signature}").get("/api/unread-count"), 401)


def test_a_provider_token_counts_with_the_right_key_algorithm_and_audience(
    serve: Callable[..., Running], client: Client, provider: rsa.RSAPrivateKey
) -> None:
    open_to_all = serve(jwt_public_key=pem(provider))
    bound = serve(jwt_public_key=pem(provider), jwt_audience="bellhop")
    good = {"sub": "alice", "exp": SOON}

    def status(running: Running, token: str) -> int:
        return client(running.url, token).get("/api/unread-count").status_code

    assert status(open_to_all, jwt.encode(good, provider, "RS256")) == 200
    assert status(bound, jwt.encode(good | {"aud": "bellhop"}, provider, "RS256")) == 200
    assert status(bound, jwt.encode(good | {"aud": ["other", "bellhop"]}, provider, "RS256")) == 200
    assert status(bound, jwt.encode(good | {"aud": "other"}, provider, "RS256")) == 401
    assert status(bound, jwt.encode(good, provider, "RS256")) == 401
    assert status(bound, user_token("alice")) == 200, "our own tokens need no audience"
    for running in (open_to_all, bound):
        aud = {"aud": "bellhop"} if running is bound else {}
        other = rsa.generate_private_key(65537, 2048)
        assert status(running, jwt.encode(good | aud, other, "RS256")) == 401
        assert status(running, jwt.encode(good | aud, provider, "RS512")) == 401
        assert status(running, jwt.encode(good | aud, provider, "PS256")) == 401
        assert status(running, jwt.encode(good | aud | {"exp": 1}, provider, "RS256")) == 401
        assert status(running, jwt.encode(aud | {"sub": "alice"}, provider, "RS256")) == 401
        confused = app.jwt.api_jws.PyJWS().encode(
            json.dumps(good | aud).encode(), "0" * 32, "HS256"
        )  # then signed with the public key as if it were a shared secret
        head, claims, _ = confused.split(".")
        digest = app.hmac.digest(pem(provider).encode(), f"{head}.{claims}".encode(), "sha256")
        mac = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        assert status(running, f"{head}.{claims}.{mac}") == 401


def test_an_elliptic_providers_token_counts_too(serve: Callable[..., Running], client: Client) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    running = serve(jwt_public_key=pem(key))
    token = jwt.encode({"sub": "alice", "exp": SOON}, key, "ES256")
    assert client(running.url, token).get("/api/unread-count").status_code == 200
    other = jwt.encode({"sub": "alice", "exp": SOON}, ec.generate_private_key(ec.SECP256R1()), "ES256")
    assert client(running.url, other).get("/api/unread-count").status_code == 401
    with pytest.raises(app.StartError):
        serve(jwt_public_key=pem(ec.generate_private_key(ec.SECP384R1())))


# ─── The session cookie ───


@pytest.fixture
def page(service: Running, client: Client, sign_in: Callable[..., str]) -> httpx.Client:
    """Alice's browser."""
    browser = client(service.url)
    browser.cookies.set("bellhop_session", sign_in("alice"))
    return browser


def test_signing_in_trades_a_token_for_a_cookie_and_signing_out_takes_it_back(
    service: Running, client: Client
) -> None:
    browser = client(service.url)
    for proof in (jwt.encode({"sub": "alice", "exp": SOON}, LINK_KEY), user_token("alice")):
        reply = browser.post("/login", json={"token": proof})
        assert reply.status_code == 200
        cookie = reply.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie and "path=/" in cookie
        assert browser.get("/api/unread-count").status_code == 200
        assert browser.post("/logout", json={}, headers={"Origin": service.url}).status_code == 200
        problem(browser.get("/api/unread-count"), 401)
    problem(browser.post("/login", json={"token": "wrong"}), 401)
    problem(browser.post("/login", json={"token": proof}, headers={"Sec-Fetch-Site": "cross-site"}), 403)


def test_a_cookie_changes_things_only_from_our_own_pages(
    page: httpx.Client, post: Callable[..., Json], contents: Callable[[], Json]
) -> None:
    own, sent = str(page.base_url).rstrip("/"), post()
    path, body, before = f"/api/notifications/{sent['id']}", {"read": True}, contents()
    refused: list[dict[str, str]] = [
        {}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": own + ".evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Origin": own},
    ]  # fmt: skip
    for headers in refused:
        assert problem(page.patch(path, json=body, headers=headers), 403)["code"] == "cross_site", headers
        problem(page.patch("/api/notifications", json={"all": True}, headers=headers), 403)
        problem(page.patch("/api/preferences", json={"locale": "de"}, headers=headers), 403)
        problem(
            page.request("DELETE", "/api/push/subscriptions", json={"endpoint": "x"}, headers=headers), 403
        )
        problem(page.post("/logout", json={}, headers=headers), 403)
    assert contents() == before
    assert page.get(path).status_code == 200, "reading needs nothing"
    assert page.patch(path, json=body, headers={"Origin": own}).json()["notification"]["read_at"]
    archived = page.patch(path, json={"archived": True}, headers={"Sec-Fetch-Site": "same-origin"})
    assert archived.json()["notification"]["archived_at"]


def test_a_cookie_changes_things_only_with_json(
    page: httpx.Client, post: Callable[..., Json], contents: Callable[[], Json]
) -> None:
    sent, own = post(), {"Sec-Fetch-Site": "same-origin"}
    before = contents()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = own | ({"Content-Type": kind} if kind else {})
        for path in (f"/api/notifications/{sent['id']}", "/api/preferences", "/api/notifications"):
            problem(page.patch(path, content=b'{"read": true}', headers=headers), 415)
        problem(page.post(f"/api/outbox/{uuid4()}/send", headers=headers), 415)
    assert contents() == before


def test_a_session_is_not_an_admins_unless_a_link_or_the_provider_made_it(
    serve: Callable[..., Running], client: Client, make_key: Callable[[str], str], provider: rsa.RSAPrivateKey
) -> None:
    running = serve(admins="root,second", jwt_public_key=pem(provider))
    gate = running.service.gate

    def keys(cookie: str) -> int:
        return client(running.url, Cookie=f"bellhop_session={cookie}").get("/api/keys").status_code

    minted = client(running.url, make_key("send")).post("/api/users/root/token", json={}).json()["token"]
    assert client(running.url, minted).get("/api/unread-count").status_code == 200
    problem(client(running.url, minted).get("/api/keys"), 403)
    admin = client(running.url, make_key("admin"))
    for user, status in (("root", 200), ("alice", 403)):
        token = admin.post(f"/api/users/{user}/token", json={}).json()["token"]
        assert keys(gate.start_session(token)) == status
        problem(client(running.url, token).get("/api/keys"), 403)
    assert keys(gate.start_session(minted)) == 403
    browser = client(running.url)
    assert browser.post("/login", json={"token": minted}).status_code == 200
    problem(browser.get("/api/keys"), 403)
    life = app.timedelta(minutes=5)
    assert keys(gate.start_session(app.make_token(LINK_KEY, "root", life))) == 200
    assert keys(gate.start_session(app.make_token(LINK_KEY, "second", life))) == 200
    assert keys(gate.start_session(app.make_token(LINK_KEY, "alice", life))) == 403
    assert keys(gate.start_session(app.make_token(LINK_KEY, "alice", life, admin=True))) == 200
    assert keys(gate.start_session(jwt.encode({"sub": "root", "exp": SOON}, provider, "RS256"))) == 200
    assert keys(gate.start_session(jwt.encode({"sub": "alice", "exp": SOON}, provider, "RS256"))) == 403
    claims = {"sub": "alice", "exp": SOON, "admin": True, "trust": "admin", "provider": True}
    assert keys(gate.start_session(jwt.encode(claims, provider, "RS256"))) == 403
    assert keys(gate.start_session(jwt.encode(claims | {"sub": "root"}, SECRET))) == 403


def test_an_admins_session_is_held_to_its_own_pages_too(
    service: Running, client: Client, sign_in: Callable[..., str], sql: Callable[..., Any]
) -> None:
    admin = client(service.url, Cookie=f"bellhop_session={sign_in('alice', admin=True)}")
    problem(admin.post("/api/keys", json={"name": "x"}), 403)
    problem(admin.post("/api/keys", json={"name": "x"}, headers={"Sec-Fetch-Site": "same-site"}), 403)
    assert sql("SELECT count(*) FROM api_keys") == [(0,)]
    assert admin.post("/api/keys", json={"name": "x"}, headers={"Origin": service.url}).status_code == 201


@pytest.mark.parametrize("path", ["/", "/preferences", "/admin", f"/n/{uuid4()}"])
def test_an_api_key_opens_no_page(api: httpx.Client, path: str) -> None:
    reply = api.get(path)
    assert reply.status_code == 403 and reply.headers["Content-Type"] == "text/html; charset=utf-8"


def test_other_origins_may_call_only_when_named_and_never_with_the_cookie(
    serve: Callable[..., Running], client: Client, sign_in: Callable[..., str], contents: Callable[[], Json]
) -> None:
    running = serve(
        cors_origins="https://shop.example, http://localhost:3000", base_url="https://bell.example"
    )
    asked = {
        "Access-Control-Request-Method": "PATCH",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    mine = client(running.url, user_token("alice"))
    for origin, allowed in (
        ("https://shop.example", True), ("http://localhost:3000", True), ("https://evil.example", False),
        ("https://shop.example.evil.example", False), ("http://shop.example", False), ("null", False),
    ):  # fmt: skip
        preflight = client(running.url).options("/api/preferences", headers={"Origin": origin, **asked})
        read = mine.get("/api/unread-count", headers={"Origin": origin})
        assert read.status_code == 200, "a token proves who asks, wherever from"
        for reply in (preflight, read):
            assert reply.headers.get("access-control-allow-origin") == (origin if allowed else None), origin
            assert "access-control-allow-credentials" not in reply.headers
        if allowed:
            permitted = preflight.headers["access-control-allow-headers"].lower()
            assert "authorization" in permitted and "content-type" in permitted
    before = contents()
    browser = client(running.url, Cookie=f"bellhop_session={sign_in('alice')}", Origin="https://shop.example")
    problem(browser.patch("/api/preferences", json={"locale": "de"}), 403)
    assert contents() == before


def test_behind_tls_the_cookie_is_secure_and_the_base_url_is_our_own_page(
    serve: Callable[..., Running], client: Client
) -> None:
    running = serve(base_url="https://bell.example")
    browser = client(running.url, Origin="https://bell.example")
    signed_in = browser.post("/login", json={"token": user_token("alice")})
    assert signed_in.status_code == 200 and "secure" in signed_in.headers["set-cookie"].lower()
    cookie = signed_in.headers["set-cookie"].partition(";")[0]
    changed = browser.patch("/api/preferences", json={"locale": "de"}, headers={"Cookie": cookie})
    assert changed.status_code == 200


# ─── The proxy header ───


def test_the_proxy_header_counts_only_from_the_proxys_addresses(
    serve: Callable[..., Running], client: Client
) -> None:
    near = serve(proxy_user_header="X-Remote-User", proxy_addresses="10.0.0.0/8,127.0.0.0/8")
    far = serve(proxy_user_header="X-Remote-User", proxy_addresses="10.0.0.0/8,::1/128")
    named = {"X-Remote-User": "alice", "X-Forwarded-For": "10.1.2.3"}
    assert client(near.url, **named).get("/api/unread-count").status_code == 200
    problem(client(far.url, **named).get("/api/unread-count"), 401)
    problem(client(near.url).get("/api/unread-count"), 401)
    problem(client(near.url, **{"X-Remote-User": "a" * 201}).get("/api/unread-count"), 401)
    browser = client(near.url, **named)
    problem(
        browser.patch("/api/preferences", json={"locale": "de"}, headers={"Sec-Fetch-Site": "cross-site"}),
        403,
    )
    assert browser.patch("/api/preferences", json={"locale": "de"}).status_code == 200


def test_a_header_names_a_user_in_utf8(
    serve: Callable[..., Running], client: Client, make_key: Callable[[str], str]
) -> None:
    running = serve(proxy_user_header="X-Remote-User", proxy_addresses="127.0.0.1", demo="true")
    program = client(running.url, make_key("send"))
    for user in ("zoë", "Ünal", "日本", "Ã©"):
        assert program.post("/api/notifications", json={"user_id": user, **NOTE}).status_code == 201
        for header in ("X-Remote-User", "x-demo-user-id"):
            headers = {header.encode(): user.encode()}
            reply = httpx.get(f"{running.url}/api/unread-count", headers=headers, trust_env=False)
            assert reply.json() == {"unread_count": 1}, (user, header)
        assert client(running.url, user_token(user)).get("/api/unread-count").json() == {"unread_count": 1}


# ─── The demo header ───


def test_the_demo_header_is_ignored_unless_demo_is_on(
    service: Running, client: Client, alice: httpx.Client
) -> None:
    problem(client(service.url, **{"x-demo-user-id": "alice"}).get("/api/notifications"), 401)
    assert alice.get("/api/unread-count", headers={"x-demo-user-id": "bob"}).status_code == 200


def test_a_demo_user_writes_to_itself_only(
    serve: Callable[..., Running], client: Client, sql: Callable[..., Any]
) -> None:
    running = serve(demo="true")
    demo = client(running.url, **{"x-demo-user-id": "alice"})
    sent = demo.post("/api/notifications", json=NOTE)
    assert sent.status_code == 201 and sent.json()["notification"]["user_id"] == "alice"
    for named in ({"user_id": "bob"}, {"user_id": "alice"}, {"userId": "bob"}):
        problem(demo.post("/api/notifications", json=NOTE | named), 400, "user_id")
    problem(demo.post("/api/notifications", json=NOTE | {"user_ids": ["alice"]}), 400)
    assert sql("SELECT user_id FROM notifications") == [("alice",)]
    assert demo.get("/api/unread-count").json() == {"unread_count": 1}
    problem(demo.get("/api/keys"), 403)
    problem(demo.get("/api/users/alice"), 403)
    problem(demo.post("/api/notifications/batch", json={"notifications": [NOTE]}), 403)


def test_a_demo_header_that_cannot_be_a_user_is_401(serve: Callable[..., Running], client: Client) -> None:
    running = serve(demo="true")
    problem(client(running.url, **{"x-demo-user-id": "x" * 201}).get("/api/unread-count"), 401)
    problem(client(running.url, **{"x-demo-user-id": ""}).get("/api/unread-count"), 401)


# ─── Other people's things ───

CHANGES: dict[str, list[Json]] = {  # what may be sent to a path with somebody else's id
    "/api/notifications/{id}": [{"read": True}, {"archived": True}, {"read": False, "archived": False}]
}


def bobs_things(sql: Callable[..., Any], api: httpx.Client, bob: httpx.Client) -> list[str]:
    """Ids of everything that is Bob's: notifications, messages, a browser, something scheduled."""
    api.put("/api/users/bob", json={"email": "bob@example.com"})
    bob.patch("/api/preferences", json={"email_enabled": True, "min_severity": "info"})
    bob.post("/api/push/subscriptions", json=browser("https://push.example/b"))
    for number in range(3):
        body = {"user_id": "bob", "batch_key": f"b{number}", **NOTE}
        assert api.post("/api/notifications", json=body).status_code == 201
    found = sql(
        "SELECT id FROM notifications UNION ALL SELECT id FROM outbox UNION ALL SELECT id FROM push_subscriptions"
    )
    assert len(found) == 7
    return [str(thing) for (thing,) in found]


def test_another_users_id_is_answered_exactly_like_a_missing_one_on_every_route(
    alice: httpx.Client, bob: httpx.Client, api: httpx.Client, sql: Callable[..., Any], contents: Any
) -> None:
    things, before = bobs_things(sql, api, bob), None
    before = contents()
    paths = alice.get("/openapi.json").json()["paths"]
    own_routes = [path for path in paths if "{id}" in path]
    assert "/api/notifications/{id}" in own_routes and "/api/outbox/{id}/send" in own_routes
    for path in own_routes:
        for method in paths[path]:
            for body in CHANGES.get(path, [{}]) if method != "get" else [None]:
                missing = alice.request(method, path.format(id=uuid4()), json=body)
                assert missing.status_code in (403, 404), (method, path, missing.text)
                for thing in things:
                    reply = alice.request(method, path.format(id=thing), json=body)
                    assert (reply.status_code, reply.content) == (missing.status_code, missing.content), (
                        method,
                        path,
                    )
    for body in ({"notification_id": "ID"}, {"all": True, "before": "ID"}):
        missing = alice.patch(
            "/api/notifications", content=json.dumps(body).replace("ID", str(uuid4())), headers=JSON
        )
        problem(missing, 404)
        for thing in things:
            reply = alice.patch(
                "/api/notifications", content=json.dumps(body).replace("ID", thing), headers=JSON
            )
            assert (reply.status_code, reply.content) == (404, missing.content)
    for thing in things:
        assert alice.get("/api/notifications", params={"cursor": thing}).json()["notifications"] == []
    forget = alice.request("DELETE", "/api/push/subscriptions", json={"endpoint": "https://push.example/b"})
    assert forget.status_code == 204
    assert alice.get("/api/outbox").json() == {"outbox": []}
    assert contents() == before


JSON = {"Content-Type": "application/json"}


def test_get_and_head_change_nothing_anywhere(
    alice: httpx.Client, bob: httpx.Client, api: httpx.Client, sql: Callable[..., Any], contents: Any
) -> None:
    things = bobs_things(sql, api, bob)
    before = contents()
    paths = api.get("/openapi.json").json()["paths"]
    asked = 0
    for path in ["/", *(path for path in paths if path != "/api/stream")]:
        for thing in things if "{id}" in path else ["bob"]:
            for one in (bob, api):
                full = path.replace("{id}", thing).replace("{user_id}", "bob").replace("{token}", "x")
                read, head = one.get(full), one.head(full)
                assert head.status_code == read.status_code and head.content == b"", full
                assert read.status_code < 500, full
                asked += 1
    assert asked > 30
    assert contents() == before


def test_head_of_the_stream_ends(bob: httpx.Client) -> None:
    reply = bob.head("/api/stream")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    assert bob.get("/api/unread-count", timeout=3).status_code == 200
