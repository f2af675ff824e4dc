"""A real Prometheus that scrapes what it is told, evaluates our rules and answers queries."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from specinfer_bench.chaos.processes import Process, end_all, free_port
from tests.kit.waiting import until

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules"
ANSWER_SECONDS = 30.0


class QueryFailed(Exception):
    """Prometheus did not take an expression; the message is its own."""


class Prometheus:
    """Asks a Prometheus."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http

    async def instant(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression now that have a finite value; raises QueryFailed."""
        found = await self._get("query", query=expression)
        if found["resultType"] == "scalar":
            return [{"metric": {}, "value": found["result"]}]
        return [each for each in found["result"] if math.isfinite(float(each["value"][1]))]

    async def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health."""
        groups = (await self._get("rules"))["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def targets(self) -> list[dict[str, Any]]:
        """Everything that is scraped."""
        found: list[dict[str, Any]] = (await self._get("targets"))["activeTargets"]
        return found

    async def label_values(self, label: str, series: str) -> list[str]:
        """The values that a label has in some series."""
        found: Any = await self._get(f"label/{label}/values", **{"match[]": series})
        return [str(value) for value in found]

    async def _get(self, path: str, **query: str) -> dict[str, Any]:
        answer = (await self._http.get(f"{self.url}/api/v1/{path}", params=query)).json()
        if answer["status"] != "success":
            raise QueryFailed(str(answer["error"]))
        data: dict[str, Any] = answer["data"]
        return data


def prometheus_binary() -> str:
    """Its path; skip where there is none, fail where CI has none."""
    path = shutil.which("prometheus")
    if path is None and os.environ.get("CI"):
        pytest.fail("prometheus is not installed, and CI must have it")
    if path is None:
        pytest.skip("prometheus is not installed")
    return path


@asynccontextmanager
async def prometheus(
    folder: Path, jobs: Mapping[str, Sequence[str]], *, seconds: int = 1
) -> AsyncIterator[Prometheus]:
    """One that scrapes addresses by job, every so many seconds, until the block ends."""
    text = yaml.safe_dump(_config(jobs, seconds))
    await asyncio.to_thread(_write, folder, text)
    address = f"127.0.0.1:{free_port()}"
    command = [prometheus_binary(), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as http:

        async def ready() -> bool:
            try:
                return (await http.get(f"http://{address}/-/ready")).is_success
            except httpx.TransportError:
                return False

        process = Process("prometheus", command, folder / "prometheus.log", ready)
        try:
            await process.start()
            asked = Prometheus(f"http://{address}", http)
            await until(lambda: _all_up(asked), "every target is scraped", ANSWER_SECONDS)
            yield asked
        finally:
            await asyncio.shield(end_all([process]))


def _config(jobs: Mapping[str, Sequence[str]], seconds: int) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": f"{seconds}s", "evaluation_interval": f"{seconds}s"},
        "rule_files": [f"{RULES}/*.yml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
            for job, addresses in jobs.items()
        ],
    }


def _write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")


async def _all_up(asked: Prometheus) -> bool:
    targets = await asked.targets()
    return bool(targets) and all(target["health"] == "up" for target in targets)
