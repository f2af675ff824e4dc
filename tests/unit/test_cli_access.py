"""Commands that call a router send the key they are given, over TLS where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from specinfer.rpc import TlsSettings
from specinfer.testing import FakeRouter
from specinfer_cli.app import app
from tests.kit.certificates import make_certificates

COMMANDS = (("generate", "hello"), ("chat",), ("explain", "unknown"))


def run(*arguments: str, **variables: str) -> Result:
    environment = {"SPECINFER_API_KEY": "", "SPECINFER_TLS_CA": "", **variables}
    return CliRunner(env=environment).invoke(app, arguments, input="hello\n")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_key_is_sent(command: tuple[str, ...]) -> None:
    with FakeRouter("an answer", api_keys=("right",)) as router:
        at = (*command, "--router", router.address)
        for result in (run(*at), run(*at, "--api-key", "wrong")):
            assert result.exit_code == 1
            assert "key" in result.stderr
        for result in (run(*at, "--api-key", "right"), run(*at, SPECINFER_API_KEY="right")):
            # The fake knows no such request, and says so to those whom it lets in.
            let_in = (
                "'unknown'" in result.stderr if command[0] == "explain" else not result.exit_code
            )
            assert let_in, result.output
            assert "right" not in result.output


def test_tls(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    tls = TlsSettings(None, made.server.certificate, made.server.key)
    with FakeRouter("an answer", api_keys=("right",), tls=tls) as router:
        at = ("generate", "hello", "--router", router.address, "--api-key", "right")
        trusted = run(*at, "--tls-ca", str(made.ca))
        assert (trusted.exit_code, trusted.stdout) == (0, "an answer\n"), trusted.output
        strange = run(*at, "--timeout", "1", "--tls-ca", str(made.stranger.certificate))
        assert strange.exit_code == 1
    missing = run(*at, "--tls-ca", str(tmp_path / "missing"))
    assert (missing.exit_code, "cannot read" in missing.stderr) == (2, True)
