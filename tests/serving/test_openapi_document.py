"""Requests made from the app's own OpenAPI document: no 5xx, and every answer is as documented.

RHEOSTAT_SCHEMA_CASES sets how many for each of the two routes that complete (``make test-api``: 1,000 each).
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

from conftest import serving  # type: ignore[import-not-found]
from rheostat.engines.fake import FakeEngine
from rheostat.serving.server.app import Server
from rheostat.serving.server.models import Models

load_all_checks()
NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
WANTED = [check for check in CHECKS.get_all() if check.__name__ in NAMES]
CASES = int(os.environ.get("RHEOSTAT_SCHEMA_CASES", "30"))


@pytest.fixture(scope="module")
def api() -> Iterator[object]:
    server = Server(Models(FakeEngine(chat_template="{{ messages[-1].content }}", context_length=64)))
    for running in serving(server):
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


ROUTES = (
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
)


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_every_answer_is_as_documented(api: Any, path: str, method: str) -> None:
    statuses: Counter[int] = Counter()

    @hypothesis.given(case=api[path][method].as_strategy(), is_known=st.booleans())
    @hypothesis.settings(
        max_examples=CASES if method == "POST" else max(1, CASES // 10),
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
    )
    def run(case: schemathesis.Case, is_known: bool) -> None:
        if isinstance(case.body, dict) and is_known:  # an unknown model would end most cases before they begin
            case.body["model"] = "fake"
        statuses[case.call_and_validate(checks=WANTED).status_code] += 1

    run()
    if CASES >= 200:  # among a few dozen, none may be sound
        assert statuses[200] or "{" in path, statuses


def test_the_document_has_no_other_routes(api: Any) -> None:
    found = {(path, method.upper()) for path, item in api.raw_schema["paths"].items() for method in item}
    assert found == set(ROUTES)


def test_all_checks_are_known() -> None:
    assert len(WANTED) == len(NAMES)
