"""Calls made up by schemathesis from the published OpenAPI document, and what was wrong with them.

Knows nothing of how the API is served.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# Bodies are large and take their time to make up; that is no fault.
_SLOW = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]
# Most calls go where most can go wrong.
WEIGHTS = {"ChatBody": 5, "CompletionBody": 5, "ResponseBody": 5}


@dataclass
class Report:
    """What came of a run.

    Attributes:
        statuses: answers by operation and status.
        failures: what was wrong, with the call that showed it.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def num_cases(self) -> int:
        """Calls made."""
        return sum(self.statuses.values())


def fuzz(
    url: str,
    document: dict[str, Any],
    num_cases: int,
    known: Callable[[requests.Session], dict[str, str]],
) -> Report:
    """Make at least `num_cases` calls, valid and invalid ones, and judge every answer.

    Args:
        url: where the API is served.
        document: its OpenAPI document.
        num_cases: spread over the operations.
        known: makes values of path parameters that exist, for every second call that takes some.
    """
    schema = schemathesis.openapi.from_dict(document)
    results: list[Any] = list(schema.get_all_operations())
    operations = [result.ok() for result in results]
    weights = [_weight(operation) for operation in operations]
    report = Report()
    with requests.Session() as session:
        for run_seed in count():
            share = (num_cases - report.num_cases) / sum(weights) / 2
            if share <= 0:
                return report
            for operation, weight in zip(operations, weights, strict=True):
                for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
                    cases = operation.as_strategy(generation_mode=mode)
                    for case in _drawn(cases, 1 + int(share * weight), run_seed):
                        if case.path_parameters and report.num_cases % 2:
                            case.path_parameters.update(_known_ones(case, known(session)))
                        _judge(case, url, session, report)
    raise AssertionError("unreachable")


def _weight(operation: Any) -> int:
    text = str(operation.definition.raw.get("requestBody", ""))
    return next((weight for name, weight in WEIGHTS.items() if name in text), 1)


def _known_ones(case: Any, known: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in known.items() if name in case.path_parameters}


def _drawn(cases: Any, number: int, run_seed: int) -> list[Any]:
    """So many cases, the same for a seed; none where there is nothing to make wrong."""
    drawn: list[Any] = []

    @seed(run_seed)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=_SLOW,
    )
    @given(cases)
    def draw(case: Any) -> None:
        drawn.append(case)

    with warnings.catch_warnings(), suppress(Unsatisfiable):
        warnings.simplefilter("ignore")
        draw()
    return drawn


def _judge(case: Any, url: str, session: requests.Session, report: Report) -> None:
    response = case.call(base_url=url, session=session, timeout=30)
    report.statuses[case.operation.label, response.status_code] += 1
    try:
        case.validate_response(response, checks=CHECKS)
    except AssertionError as error:
        report.failures.append(f"{case.as_curl_command()[:2000]}\n{error}")
    except BaseExceptionGroup as group:
        report.failures.append(f"{case.as_curl_command()[:2000]}\n{group.exceptions}")
