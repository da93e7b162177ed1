"""GET /openapi.json: a valid document that has every route, and real answers that keep to it.

The document is templates/openapi.json. Its answers, errors and proofs are written by hand; what the code
knows as well, `python tests/test_openapi.py` writes into it: paths, parameters and bodies.
"""

import copy
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import jsonschema_rs
import pytest
import schemathesis
from conftest import Running, user_token

import app

Json = dict[str, Any]
Client = Callable[..., httpx.Client]
NOTE = {"user_id": "alice", "event_name": "comment.created", "title": "A comment", "body": "Inside"}
BROWSER = {
    "endpoint": "https://push.example.org/1",
    "keys": {
        "p256dh": "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
        "auth": "BTBZMqHH6r4Tts7J_aSIgg",
    },
}
JSON = {"Content-Type": "application/json"}
HOOK = {"url": "https://127.0.0.1:9/", "user_id": "alice", "min_severity": "info"}  # inside: refused


DOCUMENT = app.HERE / "templates/openapi.json"


def with_routes(document: Json) -> Json:
    """The document with what the routes and types of the code say."""
    version = app.msgspec.toml.decode((app.HERE / "pyproject.toml").read_bytes())["project"]["version"]
    document = copy.deepcopy(document) | {"info": {"title": "Bellhop", "version": version}}
    routes = [route for route in app.ROUTES if route.path.startswith(("/api/", "/health/"))]
    taken = [route.takes for route in routes if route.takes]
    reference = "#/components/schemas/{name}"
    shapes, types = app.msgspec.json.schema_components(taken, ref_template=reference)
    shape_of = dict(zip(map(str, taken), json.loads(app.encode(shapes)), strict=True))
    types = json.loads(app.encode(types))
    before, document["paths"] = document["paths"], {}
    for route in routes:
        method, path = route.method.lower(), re.sub(r":\w+", "", route.path)
        operation = before.get(path, {}).get(method, {"security": [], "responses": {}})
        operation |= {"operationId": f"{method} {path}", "parameters": parameters(route, types)}
        operation["description"] = about(route)
        if route.takes and method != "get":
            operation["requestBody"] = {
                "content": {"application/json": {"schema": shape_of[str(route.takes)]}},
                "required": route.takes not in app.MAY_BE_EMPTY,
            }
        document["paths"].setdefault(path, {})[method] = operation
    asked = {route.takes.__name__ for route in routes if route.takes and route.method == "GET"}
    schemas = document["components"]["schemas"]
    for name in sorted(types.keys() - asked):  # which fields go together is written by hand too
        together = {rule: schemas[name][rule] for rule in ("oneOf", "anyOf") if rule in schemas.get(name, {})}
        schemas[name] = types[name] | together
    return document


def about(route: app.Route) -> str:
    """What a route does: the head of its statement, if that is all it is, or what its action says."""
    statement = inspect.getclosurevars(route.act).nonlocals.get("name")
    lines = app.QUERIES[statement].text.decode().splitlines() if statement else []
    head = [line.removeprefix("-- ") for line in itertools.takewhile(lambda line: line[:2] == "--", lines)]
    return " ".join(head or (route.act.__doc__ or "").split())


def parameters(route: app.Route, types: Json) -> list[Json]:
    """What stands in a route's path, and what its query may hold."""
    kinds = {
        "uuid": {"type": "string", "format": "uuid"},
        "str": {"type": "string", "minLength": 1, "maxLength": 200},
    }
    told = [
        {"name": name, "in": "path", "required": True, "schema": kinds[kind]}
        for name, kind in re.findall(r"{(\w+):(\w+)}", route.path)
    ]
    if route.takes and route.method == "GET":
        fields = types[route.takes.__name__]["properties"]
        told += [{"name": name, "in": "query", "schema": kind} for name, kind in fields.items()]
    return told


def written(value: Json, depth: int = 0) -> str:
    """A JSON object with a line for each operation, answer and type."""
    if depth == 3 or not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    lines = [f'{"  " * (depth + 1)}"{name}": {written(part, depth + 1)}' for name, part in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}"


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Method, path and description of every operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def patterns(schema: Any) -> Iterator[str]:
    """Every pattern below a schema."""
    for name, part in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if name == "pattern" and isinstance(part, str):
            yield part
        elif isinstance(part, dict | list):
            yield from patterns(part)


class Described:
    """Asks, and holds every answer against its description; a field that is not described is a fault too."""

    def __init__(self, document: Json) -> None:
        self.document, self.seen = copy.deepcopy(document), set[tuple[str, str, str]]()
        for schema in self.document["components"]["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)

    def check(self, method: str, path: str, reply: httpx.Response) -> Any:
        """The answer's body, after its status, its type and its shape were found in the document."""
        status = str(reply.status_code)
        known = self.document["paths"][path][method.lower()]["responses"]
        assert status in known and status != "500", f"{method} {path} answered {status}: {reply.text[:300]}"
        response = self.document["components"]["responses"][known[status]["$ref"].rpartition("/")[2]]
        self.seen.add((method, path, status))
        if "content" not in response:
            assert not reply.content
            return None
        [(kind, content)] = response["content"].items()
        assert reply.headers["content-type"].partition(";")[0] == kind, f"{method} {path}"
        if kind == "text/event-stream":
            return reply.text
        whole = {**content["schema"], "components": self.document["components"]}
        jsonschema_rs.Draft202012Validator(whole, validate_formats=True).validate(reply.json())
        return reply.json()

    def ask(self, client: httpx.Client, request: str, body: Any = None, /, **parts: Any) -> Any:
        """Send a request such as `GET /api/users/{user_id}`, which is to succeed, and check what comes."""
        method, path = request.split()
        given = {} if body is None else {"content": json.dumps(body), "headers": JSON}
        reply = client.request(method, path.format(**parts), **given)
        assert reply.status_code < 400, f"{request} answered {reply.status_code}: {reply.text[:300]}"
        return self.check(method, path, reply)


@pytest.fixture
def still(serve: Callable[..., Running]) -> Running:
    """A service that delivers nothing, so that messages wait to be looked at."""
    return serve(delivery_concurrency=0)


@pytest.fixture
def document(still: Running) -> Json:
    return httpx.get(f"{still.url}/openapi.json").json()


@pytest.fixture
def described(document: Json) -> Described:
    return Described(document)


@pytest.fixture
def program(still: Running, client: Client, make_key: Callable[[str], str]) -> httpx.Client:
    return client(still.url, make_key("admin"))


@pytest.fixture
def reader(still: Running, client: Client) -> httpx.Client:
    """Alice at the service that stands still."""
    return client(still.url, user_token("alice"))


def test_the_document_says_what_the_code_does() -> None:
    document = json.loads(DOCUMENT.read_text())
    assert with_routes(document) == document, "run python tests/test_openapi.py, and fill in the answers"
    incomplete = copy.deepcopy(document)
    del incomplete["paths"]["/api/outbox"]
    assert with_routes(incomplete) != incomplete


def test_the_document_is_valid_openapi(document: Json) -> None:
    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.validator_for({**schema, "components": document["components"]})


def test_every_pattern_is_one_that_browsers_understand_too(document: Json) -> None:
    for pattern in set(patterns(document)):
        assert "\\Z" not in pattern and "(?P" not in pattern, pattern
        jsonschema_rs.validator_for({"pattern": pattern})


def test_the_document_has_every_route_but_the_pages(still: Running, document: Json) -> None:
    served = {
        (route.method, re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path))
        for route in app.ROUTES
        if route.path.startswith(("/api/", "/health/"))
    }
    assert {(method, path) for method, path, _ in operations(document)} == served


def test_every_operation_says_what_it_does_who_may_and_how_it_fails(document: Json) -> None:
    for method, path, operation in operations(document):
        where = f"{method} {path}"
        assert len(operation["description"]) > 3, where
        assert any(status < "4" for status in operation["responses"]), where
        assert "500" in operation["responses"], where
        if path.startswith("/api/"):
            assert {"401", "403", "503"} <= operation["responses"].keys() and operation["security"], where
        if "requestBody" in operation:
            assert {"400", "413", "415"} <= operation["responses"].keys(), where
        if "{" in path:
            assert "404" in operation["responses"], where
            named = {part["name"] for part in operation["parameters"] if part["in"] == "path"}
            assert named == set(re.findall(r"\{(\w+)\}", path)), where


def test_every_code_is_in_the_document_and_no_other(document: Json) -> None:
    components = document["components"]
    assert components["schemas"]["Problem"]["properties"]["code"]["enum"] == list(app.PROBLEMS)
    told = " ".join(response["description"] for response in components["responses"].values())
    for code, (status, _) in app.PROBLEMS.items():  # a path the document has never answers 405
        assert status == 405 or re.search(rf"\b{code}\b", told), code


def test_the_answers_of_an_inbox_are_as_described(
    still: Running, described: Described, reader: httpx.Client, program: httpx.Client
) -> None:
    wishes: Json = {"email_enabled": True, "push_enabled": True, "min_severity": "info"}
    wishes["events"] = {"a.*": {"push": False}}
    described.ask(program, "PUT /api/users/{user_id}", {"email": "alice@example.org"}, user_id="alice")
    described.ask(reader, "PATCH /api/preferences", wishes)
    described.ask(reader, "GET /api/preferences")
    described.ask(reader, "GET /api/push/key")
    described.ask(reader, "POST /api/push/subscriptions", BROWSER)
    described.ask(reader, "POST /api/push/subscriptions", BROWSER)
    full = {"summary": "Short", "target_url": "/a", "data": {"n": 1}, "batch_key": "b", "subject_key": "s"}
    made = described.ask(program, "POST /api/notifications", NOTE | full | {"idempotency_key": "k"})
    described.ask(program, "POST /api/notifications", NOTE | full | {"idempotency_key": "k"})
    described.ask(program, "POST /api/notifications", NOTE | {"event_name": "a.b", "batch_key": "other"})
    id = made["notification"]["id"]
    assert {each["channel"] for each in made["deliveries"]} == {"email", "push"}
    first = reader.get("/api/notifications?limit=1")
    assert described.check("GET", "/api/notifications", first)["next_cursor"]
    known = {"If-None-Match": first.headers["etag"]}
    described.check("GET", "/api/notifications", reader.get("/api/notifications?limit=1", headers=known))
    described.ask(reader, "GET /api/notifications/{id}", id=id)
    described.ask(reader, "GET /api/unread-count")
    described.ask(reader, "PATCH /api/notifications/{id}", {"read": True, "archived": True}, id=id)
    described.ask(reader, "PATCH /api/notifications", {"notification_id": id})
    described.ask(reader, "PATCH /api/notifications", {"all": True})
    waiting = described.ask(reader, "GET /api/outbox")["outbox"]
    digests = [message for message in waiting if message["batch_key"]]
    described.ask(reader, "POST /api/outbox/{id}/send", id=digests[0]["id"])
    described.ask(reader, "POST /api/outbox/{id}/skip", id=digests[1]["id"])
    described.ask(reader, "DELETE /api/push/subscriptions", {"endpoint": BROWSER["endpoint"]})
    with reader.stream("GET", "/api/stream") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        described.seen.add(("GET", "/api/stream", "200"))
    missing(described, "user")


def test_the_answers_to_programs_are_as_described(described: Described, program: httpx.Client) -> None:
    for_bob = NOTE | {"user_id": "bob"}
    described.ask(program, "POST /api/notifications/batch", {"notifications": [NOTE, for_bob]})
    many = {name: value for name, value in NOTE.items() if name != "user_id"} | {"user_ids": ["alice", "bob"]}
    described.ask(program, "POST /api/notifications", many)
    later = described.ask(program, "POST /api/notifications", NOTE | {"deliver_at": "2100-01-01T00:00:00Z"})
    described.ask(program, "POST /api/notifications/preview", NOTE)
    described.ask(program, "POST /api/notifications/preview", many)
    described.ask(program, "POST /api/resolve", {"subject_key": "invoice:42"})
    described.ask(program, "PUT /api/users/{user_id}", {"email": "a@b.example"}, user_id="alice")
    described.ask(program, "PATCH /api/users/{user_id}/preferences", {"quiet_from": "22:00"}, user_id="alice")
    described.ask(program, "GET /api/users/{user_id}", user_id="alice")
    described.ask(program, "GET /api/users/{user_id}", user_id="nobody")
    described.ask(program, "GET /api/users/{user_id}/export", user_id="alice")
    described.ask(program, "POST /api/users/{user_id}/token", {"minutes": 5}, user_id="alice")
    described.ask(program, "DELETE /api/scheduled/{id}", id=later["scheduled"]["id"])
    described.ask(program, "PATCH /api/users/{user_id}/preferences", {"in_app_enabled": False}, user_id="bob")
    assert described.ask(program, "POST /api/notifications", for_bob)["notification"] is None
    described.ask(program, "POST /api/notifications", many)
    described.ask(program, "DELETE /api/users/{user_id}", user_id="bob")
    missing(described, "program")


def test_the_answers_to_admins_are_as_described(
    still: Running, described: Described, program: httpx.Client, sql: Callable[..., Any]
) -> None:
    hook = described.ask(program, "POST /api/webhooks", HOOK)["webhook"]["id"]
    described.ask(program, "GET /api/webhooks")
    for _ in range(2):
        described.ask(program, "POST /api/notifications", NOTE)
    sql("UPDATE outbox SET state = 'failed', finished_at = now(), last_error = 'no'")
    sql("UPDATE deliveries SET status = 'failed', last_error = 'no'")
    sql("INSERT INTO breakers VALUES ('email', 10, now()), ('webhook:a', 1, NULL)")
    failed = described.ask(program, "GET /api/deliveries")["deliveries"]
    narrowed = program.get("/api/deliveries?limit=1&status=failed&channel=webhook")
    assert described.check("GET", "/api/deliveries", narrowed)["next_cursor"]
    described.ask(program, "GET /api/stats")
    described.ask(program, "POST /api/deliveries/{id}/retry", id=failed[0]["id"])
    again = program.post(f"/api/deliveries/{failed[0]['id']}/retry")
    assert described.check("POST", "/api/deliveries/{id}/retry", again)["code"] == "conflict"
    described.ask(program, "POST /api/deliveries/retry", {})
    described.ask(program, "GET /api/stats")
    described.ask(program, "PATCH /api/webhooks/{id}", {"enabled": False}, id=hook)
    described.ask(program, "POST /api/webhooks/{id}/rotate", id=hook)
    described.ask(program, "POST /api/webhooks/{id}/test", id=hook)
    described.ask(program, "DELETE /api/webhooks/{id}", id=hook)
    key = described.ask(program, "POST /api/keys", {"name": "cron"})["key"]["id"]
    described.ask(program, "GET /api/keys")
    described.ask(program, "DELETE /api/keys/{id}", id=key)
    described.ask(program, "GET /health/live")
    described.ask(program, "GET /health/ready")
    missing(described, "admin")


def missing(described: Described, caller: str) -> None:
    """Fail when an operation of this caller was never seen to succeed, in one of the ways it names."""
    callers = {(route.method, re.sub(r":\w+", "", route.path)): route.by for route in app.ROUTES}
    assert caller in callers.values()
    for method, path, operation in operations(described.document):
        if callers[method, path] == caller:
            for status in operation["responses"]:
                if status < "400" or status == "409":
                    assert (method, path, status) in described.seen, f"{method} {path} {status}"


def test_the_errors_are_as_described(
    still: Running, described: Described, reader: httpx.Client, program: httpx.Client, client: Client
) -> None:
    for route in app.ROUTES:
        if not route.by or not route.path.startswith("/api/"):
            continue
        method, path = route.method, re.sub(r":\w+", "", route.path)
        filled = path.format(id=uuid4(), user_id="alice")
        right, wrong = (reader, program) if route.by == "user" else (program, reader)
        described.check(method, path, client(still.url).request(method, filled))
        assert described.check(method, path, wrong.request(method, filled))["code"] == "forbidden"
        if "requestBody" in described.document["paths"][path][method.lower()]:
            check_bodies(described, right, method, path, filled)
        elif "{id}" in path:
            assert described.check(method, path, right.request(method, filled))["code"] == "not_found"
    found = {status for _, _, status in described.seen}
    assert {"400", "401", "403", "404", "413", "415"} <= found


def check_bodies(described: Described, right: httpx.Client, method: str, path: str, filled: str) -> None:
    """What every operation with a body answers to one that is not acceptable."""
    for content, headers, code in (
        (b"{", JSON, "not_json"),
        (b'{"no_such_field": 1}', JSON, "invalid"),
        (b"{}", {"Content-Type": "text/plain"}, "unsupported_media_type"),
        (b" " * (5 * 1024 * 1024), JSON, "too_large"),
    ):
        reply = right.request(method, filled, content=content, headers=headers)
        assert described.check(method, path, reply)["code"] == code, f"{method} {path}"


def test_an_undescribed_field_or_status_is_found(document: Json) -> None:
    strict, id = Described(document), str(UUID(int=0))
    for status, told in ((200, {"id": id, "more": 1}), (200, {}), (200, {"id": "no"}), (418, {"id": id})):
        reply = httpx.Response(status, json=told)
        with pytest.raises((AssertionError, jsonschema_rs.ValidationError)):
            strict.check("POST", "/api/outbox/{id}/send", reply)
    assert strict.check("POST", "/api/outbox/{id}/send", httpx.Response(200, json={"id": id})) == {"id": id}


if __name__ == "__main__":
    DOCUMENT.write_text(written(with_routes(json.loads(DOCUMENT.read_text()))) + "\n")
