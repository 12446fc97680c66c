"""Schemathesis on every route of a live server: valid and invalid requests made from its own description."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
"""5xx; statuses, content types and bodies that /openapi.json does not tell of."""
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


def _aimed(body: Any, model: str) -> None:
    """Point a valid body at the served model and a length it has, so that requests get past the first checks."""
    if isinstance(body, dict):
        if "model" in body:
            body["model"] = model
        for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "min_tokens"):
            if isinstance(body.get(name), int):
                body[name] %= 64
        for name in ("stop_token_ids", "prompt", "prompt_token_ids"):
            if isinstance(body.get(name), list):
                body[name] = [index % 250 if isinstance(index, int) else index for index in body[name]]


def fuzz(url: str, examples: int, seed: int, model: str = "fake") -> dict[str, Any]:
    """At least `examples` requests in all; counts by route and status, and what was found."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    requests, statuses, findings = Counter[str](), Counter[str](), Counter[str]()
    generating = [operation for operation in operations if operation.method.upper() == "POST"]
    each = max(examples // (len(generating) * len(MODES)), 1)
    for operation in operations:
        # A route without a body has few different requests: it gets a tenth.
        wanted = each if operation in generating else max(each // 10, 1)
        for mode in MODES:
            label = f"{operation.method.upper()} {operation.path}"
            made = _run(operation, mode, wanted, seed, statuses, findings, label, model)
            requests[label] += made
    while sum(requests.values()) < examples:  # fewer different ones than asked for: go on with another seed
        seed += 1
        for operation in generating:
            label = f"{operation.method.upper()} {operation.path}"
            requests[label] += _run(operation, MODES[0], each, seed, statuses, findings, label, model)
    return {
        "requests": sum(requests.values()),
        "by_route": dict(sorted(requests.items())),
        "statuses": dict(sorted(statuses.items())),
        "findings": dict(findings),
    }


def _run(
    operation: Any,
    mode: Any,
    examples: int,
    seed: int,
    statuses: Counter[str],
    findings: Counter[str],
    label: str,
    model: str,
) -> int:
    made = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def once(case: Any) -> None:
        nonlocal made
        if mode == schemathesis.GenerationMode.POSITIVE:
            _aimed(case.body, model)
        response = case.call(timeout=60)
        made += 1
        statuses[str(response.status_code)] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except schemathesis.checks.FailureGroup as group:
            for failure in group.exceptions:
                findings[f"{label}: {type(failure).__name__}: {response.status_code}"] += 1

    try:
        once()
    except hypothesis.errors.Unsatisfiable:
        pass  # nothing invalid can be made for a route without parameters
    return made
