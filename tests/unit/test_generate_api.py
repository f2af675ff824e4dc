"""The SDK's reference names all that is public, and a stale one is found out."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import specinfer
import specinfer.testing

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate_api.py"


@pytest.fixture
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


def test_every_public_name_has_an_entry(tool: dict[str, Any]) -> None:
    text = tool["reference"]()
    names = {*specinfer.__all__, *specinfer.testing.__all__} - {"__version__"}
    assert [name for name in names if text.count(f"### {name}\n") != 1] == []
    assert "#### AsyncClient.resume\n" in text
    assert "- `json_schema: Mapping[str, Any] | str | None`: The completion is JSON" in text
    assert "A kind of `ResourceExhausted`; travels as `RESOURCE_EXHAUSTED`; the same call" in text
    assert "specinfer.messages" not in text
    assert text == tool["reference"]()


def test_a_stale_file_is_found_out(
    tool: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "api.md"
    main = tool["main"]
    main.__globals__["TARGET"] = target
    monkeypatch.setattr(sys, "argv", ["generate_api.py", "--check"])
    assert main() == 1
    monkeypatch.setattr(sys, "argv", ["generate_api.py"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["generate_api.py", "--check"])
    assert main() == 0
    target.write_text(target.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert main() == 1
    assert "run it" in capsys.readouterr().err
