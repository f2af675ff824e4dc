"""Settings: flags win over the environment, which wins over defaults."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from specinfer.errors import InvalidRequest
from specinfer.settings import read_settings, required_setting, setting
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_router.settings import RouterSettings


@dataclass(frozen=True)
class Example:
    model: Path = required_setting("folder")
    port: int = setting(1, "port")
    ratio: float | None = setting(None, "ratio")
    verbose: bool = setting(False, "100% of it")
    peers: tuple[str, ...] = setting((), "peers")


def read(*arguments: str, **environment: str) -> Example:
    return read_settings(
        Example,
        program="example",
        description="An example.",
        prefix="EX",
        arguments=arguments,
        environment=environment,
    )


def test_defaults_environment_and_flags() -> None:
    assert read("--model", "m") == Example(Path("m"))
    from_environment = read(EX_MODEL="m", EX_PORT="5", EX_VERBOSE="yes", EX_PEERS="a, b")
    assert from_environment == Example(Path("m"), 5, None, True, ("a", "b"))
    flags = read("--port", "7", "--no-verbose", "--peers", "c", "--peers", "d", "--ratio", ".5",
                 EX_MODEL="m", EX_PORT="5", EX_VERBOSE="1", EX_PEERS="a")  # fmt: skip
    assert flags == Example(Path("m"), 7, 0.5, False, ("c", "d"))


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(InvalidRequest, match="EX_PORT"):
        read(EX_MODEL="m", EX_PORT="many")
    with pytest.raises(InvalidRequest, match="EX_VERBOSE"):
        read(EX_MODEL="m", EX_VERBOSE="perhaps")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_numbers_that_cannot_be_calculated_with_are_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidRequest, match="EX_RATIO"):
        read(EX_MODEL="m", EX_RATIO=text)
    with pytest.raises(SystemExit):
        read("--model", "m", f"--ratio={text}")
    assert "--ratio" in capsys.readouterr().err


def test_a_missing_value_and_a_bad_flag_end_with_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ((), ("--model", "m", "--port", "many")):
        with pytest.raises(SystemExit) as caught:
            read(*arguments)
        assert caught.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_help_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "EX_PORT" in text
    assert "100% of it" in text


@pytest.mark.parametrize(
    "flags",
    [
        {"redis": "redis://127.0.0.1:1/0", "redis_ca": Path("ca.pem")},
        {"redis_ca": Path("ca.pem")},
        {"redis_cluster": True},
        {"redis_password_file": Path("password")},
        {"tls_ca": Path("ca.pem")},
    ],
)
@pytest.mark.parametrize("kind", ["router", "draft"])
def test_options_that_would_not_be_used_are_refused(kind: str, flags: dict[str, Any]) -> None:
    settings: Callable[..., RouterSettings | DraftSettings] = partial(
        RouterSettings, verify=("127.0.0.1:1",)
    )
    if kind == "draft":
        settings = partial(DraftSettings, model=Path("model"))
    with pytest.raises(InvalidRequest):
        settings(**flags)
