"""Every example runs as its documentation says, and the index names them all."""

from __future__ import annotations

import asyncio
import re
import runpy
import sys
from asyncio.subprocess import PIPE
from contextlib import suppress
from pathlib import Path

import pytest

from specinfer import TlsSettings
from specinfer.messages import GenerateRequest
from specinfer.testing import FakeReply, FakeRouter
from tests.kit.certificates import make_certificates
from tests.kit.gateway import running_gateway

FOLDER = Path(__file__).resolve().parents[2] / "examples"
ANSWERS = {
    "json_schema": '{"name": "Dune", "stars": 3}',
    "choice": "yes",
    "regex": "2026-11-21",
}
TEXT = "The quick brown fox jumps over it."

# What each example prints, but for what depends on the model.
OUTPUT = {
    "chat": rf"> What .*\n{TEXT}\n> And .*\n{TEXT}\n",
    "choice_and_regex": r"choice: yes\nregex: 2026-11-21\n",
    "explain": r"stop, first token.+\n(tokens \d-\d: draft 1\.0 ms, verify 2\.0 ms\n){3}",
    "generate": rf"{TEXT}\n7 tokens in 3 rounds\n4 of 5 guesses confirmed\nended by stop.+\n",
    "json_schema": r"Dune: \*\*\*\n",
    "keys_and_tls": rf"fake \(float32\), 1 drafters\n{TEXT}\n",
    "logprobs": r"(token \d+: 61% \(best: \d+ 61%, \d+ 22%\)\n){5}",
    "many": rf"(.+\n  {TEXT}  \[stop\]\n){{3}}",
    "prediction": r"without: 3 rounds\nwith: 3 rounds, the same tokens\n",
    "resume": rf"read 3 tokens, then left\nread the other 4 tokens\n{TEXT}\n",
    "same_tokens": r"off +7 tokens in 7 rounds\n(.+ 7 tokens in 3 rounds\n){3}all the same.+\n",
    "stream": rf"{TEXT}\n\[4 of 5 guesses confirmed\]\n",
    "stream_async": rf"{TEXT}\n\[stop\]\n",
    "testing_your_code": r"2 passed\n",
    "tree": r"(round \d: \d guesses confirmed\n(  \* +'.+'\n)*    the target's own: '.+'\n){3}",
}
ELSEWHERE = {"openai_client"}


def answer(request: GenerateRequest) -> FakeReply:
    kind = request.grammar.kind if request.grammar is not None else ""
    return FakeReply(ANSWERS.get(kind, TEXT))


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    # What an example prints tells whether it went well.
    with suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", sorted(OUTPUT))
def test_it_prints_what_it_should(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeRouter(answer) as router:
        arguments = () if name == "testing_your_code" else ("--router", router.address)
        run(name, *arguments, monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert re.fullmatch(OUTPUT[name], printed.out), printed.out
    assert printed.err == ""
    assert name == "testing_your_code" or router.requests


def test_keys_and_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    certificates = make_certificates(tmp_path)
    key_file = tmp_path / "key"
    key_file.write_text("sk-test\n")
    tls = TlsSettings(None, certificates.server.certificate, certificates.server.key)
    with FakeRouter(answer, tls=tls, api_keys=["sk-test"]) as router:
        arguments = ["--router", router.address, "--ca", str(certificates.ca)]
        run("keys_and_tls", *arguments, "--key-file", str(key_file), monkeypatch=monkeypatch)
    assert re.fullmatch(OUTPUT["keys_and_tls"], capsys.readouterr().out)


async def test_the_openai_client_at_the_gateway() -> None:
    async with running_gateway() as bench:
        arguments = ("--gateway", bench.url.removeprefix("http://"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(FOLDER / "openai_client.py"), *arguments, stdout=PIPE, stderr=PIPE
        )
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert re.search(r"\n\[table: \d+ tokens\]\n$", output.decode())


def test_the_index_names_every_example() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == set(re.findall(r"\]\((\w+)\.py\)", index))
    assert names == OUTPUT.keys() | ELSEWHERE
