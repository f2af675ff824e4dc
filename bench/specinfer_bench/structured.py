"""Structured output on a running cluster: valid every time, and equal with speculation on and off.

    python -m specinfer_bench.structured 127.0.0.1:50061 --output structured-output.json

Every request asks for JSON of one of the schemas below, sampled, once without guesses and once for
each tree shape. The schemas bound every string, number and list, so that a model of any quality
comes to an end. Whether an output is valid is judged by `jsonschema`, which shares nothing with the
engine that made the masks. This module uses the SDK alone and knows nothing of workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from specinfer import AsyncClient, Completion, SpecinferError
from specinfer.messages import Grammar, SpeculationOptions
from specinfer.options import GenerateOptions
from specinfer_bench.machine import machine_facts
from specinfer_bench.shapes import SHAPES

MAX_TOKENS = 400
MAX_REPORTED = 20
Schema = Mapping[str, Any]

_WORD = {"type": "string", "minLength": 1, "maxLength": 12}


def _object(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_ADDRESS = _object(["street", "zip"], street=_WORD, zip={"type": "string", "pattern": "^[0-9]{5}$"})
_CIRCLE = _object(["kind", "radius"], kind={"const": "circle"}, radius={"enum": [1, 2.5, 10]})
_BOX = _object(
    ["kind", "size"],
    kind={"const": "box"},
    size={"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
)
SCHEMAS: dict[str, tuple[str, Schema]] = {
    "nested objects": (
        "A person as JSON:",
        _object(
            ["name", "age", "address"],
            name=_WORD,
            age={"type": "integer", "minimum": 0, "maximum": 120},
            address=_ADDRESS,
        ),
    ),
    "enums": (
        "What kind of question is this? What does textwrap.dedent do?",
        _object(
            ["topic", "certain"],
            topic={"enum": ["strings", "files", "network", "other"]},
            level={"enum": [1, 2, 3, None]},
            certain={"type": "boolean"},
        ),
    ),
    "bounded list": (
        "Some numbers:",
        {
            "type": "array",
            "items": {"type": "integer", "minimum": -20, "maximum": 199},
            "minItems": 2,
            "maxItems": 6,
        },
    ),
    "alternatives": (
        "Shapes on a page:",
        _object(
            ["shapes"],
            shapes={
                "type": "array",
                "items": {"anyOf": [_CIRCLE, _BOX]},
                "minItems": 1,
                "maxItems": 3,
            },
        ),
    ),
    "numbers": (
        "A price:",
        _object(
            ["amount", "count"],
            amount={"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 0.25},
            count={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
        ),
    ),
    "references": (
        "A tree of names:",
        {
            "$defs": {"leaf": _object(["name"], name=_WORD)},
            **_object(
                ["name", "children"],
                name=_WORD,
                children={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3},
            ),
        },
    ),
    "optional fields": (
        "An event:",
        _object(
            ["day"],
            day={"type": "string", "format": "date"},
            place={"type": ["string", "null"], "maxLength": 10},
            tags={"type": "array", "items": {"enum": ["new", "old", "big"]}, "maxItems": 2},
        ),
    ),
    "a tool's arguments": (
        "Call the search tool for: how do I read a file?",
        _object(
            ["name", "arguments"],
            name={"const": "search"},
            arguments=_object(
                ["query", "limit"],
                query={"type": "string", "minLength": 1, "maxLength": 40},
                limit={"type": "integer", "minimum": 1, "maximum": 50},
            ),
        ),
    ),
}
SETTINGS: dict[str, GenerateOptions] = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "temperature 1.3, top-p 0.95": {"temperature": 1.3, "top_p": 0.95},
    "top-k 20": {"temperature": 1.0, "top_k": 20},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.3},
}
PLAIN = SpeculationOptions(enabled=False)


@dataclass(frozen=True)
class Case:
    """One request: a schema of SCHEMAS, sampling settings of SETTINGS and a seed."""

    schema: str
    setting: str
    seed: int

    def options(self, speculation: SpeculationOptions) -> GenerateOptions:
        """What a run of the case asks for."""
        text = json.dumps(SCHEMAS[self.schema][1])
        return {
            **SETTINGS[self.setting],
            "seed": self.seed,
            "max_tokens": MAX_TOKENS,
            "grammar": Grammar("json_schema", text),
            "speculation": speculation,
        }


@dataclass
class ShapeCounts:
    """Rounds, guesses and tokens of all runs with one tree shape."""

    num_tokens: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Count one run."""
        summary = completion.speculation
        self.num_tokens += len(completion.token_ids)
        self.num_rounds += summary.num_rounds
        self.num_draft_tokens += summary.num_draft_tokens
        self.num_accepted_tokens += summary.num_accepted_tokens

    def report(self) -> dict[str, float]:
        """The counts, and tokens a round."""
        return {**asdict(self), "tokens_per_round": self.num_tokens / max(1, self.num_rounds)}


@dataclass
class Findings:
    """What came of the cases so far.

    Attributes:
        num_cases: requests made.
        num_valid: those whose plain run ended by itself with JSON that the schema allows.
        num_equal: those whose speculated runs have the plain run's tokens and text.
        by_shape: what the speculated runs took.
        valid_by_schema: valid requests of each schema.
        failures: what was wrong, the first MAX_REPORTED.
    """

    num_cases: int = 0
    num_valid: int = 0
    num_equal: int = 0
    by_shape: dict[str, ShapeCounts] = field(
        default_factory=lambda: {name: ShapeCounts() for name in SHAPES}
    )
    valid_by_schema: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether everything was valid and equal, and guesses were put to the test."""
        all_good = self.num_valid == self.num_equal == self.num_cases > 0
        return all_good and all(counts.num_accepted_tokens for counts in self.by_shape.values())


def all_cases(num_requests: int) -> Iterator[Case]:
    """That many cases: schemas and settings in turn, no two with the same schema and seed."""
    schemas, settings = tuple(SCHEMAS), tuple(SETTINGS)
    for number in range(num_requests):
        setting = settings[number // len(schemas) % len(settings)]
        yield Case(schemas[number % len(schemas)], setting, number)


def what_is_wrong(schema: Schema, completion: Completion) -> str:
    """Why a completion is not what the schema asks for, or ""."""
    if completion.finish_reason != "stop":
        return f"ended by {completion.finish_reason}"
    try:
        value = json.loads(completion.text)
    except ValueError as error:
        return f"not JSON: {error}"
    problems = Draft202012Validator(schema).iter_errors(value)
    return "; ".join(problem.message for problem in problems)


async def run_cases(client: AsyncClient, cases: Iterator[Case], concurrency: int) -> Findings:
    """Make every request, `concurrency` of them at a time; failed calls count as neither."""
    findings = Findings()

    async def work() -> None:
        for case in cases:
            try:
                await _run_case(client, case, findings)
            except SpecinferError as error:
                _note(findings, case, f"{error.reason}: {error.message}")
            findings.num_cases += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return findings


async def _run_case(client: AsyncClient, case: Case, findings: Findings) -> None:
    prompt, schema = SCHEMAS[case.schema]
    plain = await client.generate(prompt, **case.options(PLAIN))
    wrong = what_is_wrong(schema, plain)
    if wrong:
        _note(findings, case, f"{wrong}: {plain.text!r}")
    else:
        findings.num_valid += 1
        by_schema = findings.valid_by_schema
        by_schema[case.schema] = by_schema.get(case.schema, 0) + 1
    num_different = 0
    for name, shape in SHAPES.items():
        speculated = await client.generate(prompt, **case.options(shape))
        if (speculated.token_ids, speculated.text) != (plain.token_ids, plain.text):
            num_different += 1
            _note(findings, case, f"{name}: {speculated.text!r} instead of {plain.text!r}")
        findings.by_shape[name].add(speculated)
    findings.num_equal += num_different == 0


def _note(findings: Findings, case: Case, what: str) -> None:
    if len(findings.failures) < MAX_REPORTED:
        where = f"{case.schema}, {case.setting}, seed {case.seed}"
        findings.failures.append(f"{where}: {what}")


async def measure(router: str, num_requests: int, concurrency: int) -> dict[str, Any]:
    """The report on a cluster: what it is, and what came of that many requests."""
    began = time.perf_counter()
    async with AsyncClient(router) as client:
        capabilities = await client.capabilities()
        findings = await run_cases(client, all_cases(num_requests), concurrency)
    return {
        "setup": {
            "command": shlex.join(["python", "-m", "specinfer_bench.structured", *sys.argv[1:]]),
            "model": capabilities.model,
            "model_hash": capabilities.model_hash,
            "dtype": capabilities.dtype,
            "vocab_size": capabilities.vocab_size,
            "machine": machine_facts(),
        },
        "schemas": {name: schema for name, (_, schema) in SCHEMAS.items()},
        "settings": SETTINGS,
        "num_requests": findings.num_cases,
        "num_valid": findings.num_valid,
        "num_equal": findings.num_equal,
        "valid_by_schema": findings.valid_by_schema,
        "clean": findings.clean,
        "shapes": {name: counts.report() for name, counts in findings.by_shape.items()},
        "failures": findings.failures,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    """Print the report, keep it if asked; exit status 1 unless all was valid and equal."""
    parser = argparse.ArgumentParser(prog="specinfer_bench.structured", description=__doc__)
    parser.add_argument("router", help="gRPC address of a router")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--output", type=Path, help="keep the report as JSON")
    arguments = parser.parse_args()
    report = asyncio.run(measure(arguments.router, arguments.requests, arguments.concurrency))
    text = json.dumps(report, indent=2) + "\n"
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    shown = {name: value for name, value in report.items() if name not in ("schemas", "setup")}
    print(json.dumps(shown, indent=2))
    return 0 if report["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
