"""Hundreds of requests made from /openapi.json, right and wrong: each answer is one that it names."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import schemathesis
from conftest import Running
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

TRUTHS: list[Any] = [not_a_server_error, status_code_conformance, content_type_conformance]
TRUTHS.append(response_schema_conformance)


def test_requests_made_from_the_schema_get_answers_that_it_names(
    serve: Callable[..., Running], make_key: Callable[[str], str]
) -> None:
    running, key = serve(delivery_concurrency=0, demo="true"), make_key("admin")
    callers = ({"Authorization": f"Bearer {key}"}, {"x-demo-user-id": "alice"})
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    asked: Counter[int] = Counter()

    def ask_each(operation: Any) -> None:
        valid = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        invalid = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

        @settings(
            max_examples=10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=valid | invalid)
        def ask(case: schemathesis.Case) -> None:
            for proof in callers:
                reply = case.call(headers=proof, timeout=10)
                case.validate_response(reply, checks=TRUTHS)
                asked[reply.status_code] += 1

        ask()

    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path != "/api/stream":  # it never ends
            ask_each(operation)
    assert sum(asked.values()) > 300 and {200, 201, 204, 400, 403, 404} <= asked.keys(), asked
