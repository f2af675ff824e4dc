"""`specinfer keys`: what is printed, what is kept and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from specinfer_cli.app import app
from specinfer_cli.cluster import ClusterSettings, _router_flags
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.record import KeyRecord, digest


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "SPECINFER_ROUTER_REDIS": ""}).invoke(app, arguments)


def kept(path: Path) -> dict[str, KeyRecord]:
    return asyncio.run(KeyFile(path).load())


def test_a_key_is_shown_once_and_kept_hashed(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    limits = ("--max-streams", "3", "--tokens-per-minute", "9000", "--max-priority", "2")
    result = run(
        "keys", "create", "a team", "--file", str(path), *limits, "--expires", "2099-01-01"
    )
    assert result.exit_code == 0, result.output
    key = result.stdout.strip()
    ((key_id, record),) = kept(path).items()
    assert (record.sha256, key.split("-")[1]) == (digest(key), key_id)
    assert (record.limits.max_streams, record.limits.requests_per_minute) == (3, None)
    assert (record.limits.tokens_per_minute, record.limits.max_priority) == (9000, 2)
    assert record.expires is not None
    shown = run("keys", "list", "--file", str(path)).stdout
    assert key_id in shown
    assert "a team" in shown
    assert "max_streams 3" in shown
    assert key.split("-")[2] not in shown + path.read_text()


def test_keys_are_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = [
        json.loads(run("keys", "create", name, "--file", str(path), "--json").stdout)
        for name in ("one", "two")
    ]
    listed = json.loads(run("keys", "list", "--file", str(path), "--json").stdout)
    assert [item["id"] for item in listed] == [item["id"] for item in made]
    assert run("keys", "revoke", made[0]["id"], "--file", str(path)).exit_code == 0
    assert set(kept(path)) == {made[1]["id"]}
    again = run("keys", "revoke", made[0]["id"], "--file", str(path))
    assert (again.exit_code, made[0]["id"] in again.stderr) == (1, True)


def test_keys_in_redis(redis_server: str) -> None:
    made = json.loads(run("keys", "create", "r", "--redis", redis_server, "--json").stdout)
    listed = run("keys", "list", "--redis", redis_server).stdout
    assert made["id"] in listed
    assert run("keys", "revoke", made["id"], "--redis", redis_server).exit_code == 0
    assert made["id"] not in run("keys", "list", "--redis", redis_server).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "a"), "--file FILE or --redis URL"),
        (("create", "a", "--file", "{}/keys", "--expires", "soon"), "'expires' is"),
        (("create", "a", "--file", "{}/keys", "--expires", "2001-01-01"), "in the future"),
        (("create", "", "--file", "{}/keys"), "'name' is"),
        (("create", "a", "--file", "{}/none/keys"), "No such file"),
        (("list", "--file", "{}/none"), "No such file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_said(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("keys", *(argument.format(tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_cluster_passes_its_keys_on() -> None:
    settings = ClusterSettings(model=Path("m"), keys="some/keys")
    flags = _router_flags(settings, "a:1", "a:2", ("a:3",), ())
    assert flags[flags.index("--keys") + 1] == "some/keys"
    assert "--keys" not in _router_flags(ClusterSettings(Path("m")), "a:1", "a:2", ("a:3",), ())
