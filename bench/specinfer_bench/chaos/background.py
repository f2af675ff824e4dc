"""Responses without a reader, begun on one router and read at the end through the others.

This module knows nothing of faults or processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx

from specinfer_bench.chaos.load import WIDTHS
from specinfer_bench.chaos.readings import Answer, Case, Reading

REQUEST_SECONDS = 60.0
POLL_SECONDS = 0.5
RUNNING = ("queued", "in_progress")
# One that reaches its most tokens is incomplete; its text is held against the unbroken run's.
ENDED = ("completed", "incomplete")


class Background:
    """Responses in the background.

    Attributes:
        readings: one for each; their text comes at the end.
    """

    def __init__(self, gateways: Sequence[str], model: str, cases: Sequence[Case]) -> None:
        """Use the first of `gateways` to begin and the others to read."""
        self.readings: list[Reading] = []
        self._begin_at = gateways[0]
        self._read_at = gateways[-1]
        self._model = model
        self._cases = cases
        self._http = httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False)
        self._ids: list[str] = []

    async def unbroken(self) -> dict[Case, Answer]:
        """What each case gives when nothing happens."""
        url = f"http://{self._begin_at}/v1/responses"
        answers = await asyncio.gather(
            *(self._http.post(url, json=self._body(case)) for case in self._cases)
        )
        return {
            case: Answer((), _text(answer.raise_for_status().json()))
            for case, answer in zip(self._cases, answers, strict=True)
        }

    async def begin(self) -> None:
        """Begin one response for each case."""
        url = f"http://{self._begin_at}/v1/responses"
        for case in self._cases:
            reading = Reading("background", case, time.monotonic())
            self.readings.append(reading)
            body = {**self._body(case), "background": True}
            answer = (await self._http.post(url, json=body)).raise_for_status().json()
            self._ids.append(answer["id"])

    async def finish(self, seconds: float) -> None:
        """Ask for each until it has ended; what does not end in time has failed."""
        deadline = time.monotonic() + seconds
        await asyncio.gather(
            *(
                self._read(response_id, reading, deadline)
                for response_id, reading in zip(self._ids, self.readings, strict=True)
            )
        )
        await self._http.aclose()

    async def _read(self, response_id: str, reading: Reading, deadline: float) -> None:
        status = "nothing"
        while time.monotonic() < deadline:
            try:
                answer = await self._http.get(f"http://{self._read_at}/v1/responses/{response_id}")
                body: dict[str, Any] = answer.json()
                status = body.get("status") or f"{answer.status_code}: {body}"
                if status in ENDED:
                    reading.text = _text(body)
                    reading.ended = time.monotonic()
                    return
                if answer.status_code == 200 and status not in RUNNING:
                    break
            except httpx.TransportError:
                reading.breaks += 1
            await asyncio.sleep(POLL_SECONDS)
        reading.ended = time.monotonic()
        reading.error = f"the response is {status}"

    def _body(self, case: Case) -> dict[str, object]:
        return {
            "model": self._model,
            "input": case.prompt,
            "max_output_tokens": case.max_tokens,
            "temperature": case.temperature,
            "seed": case.seed,
            "speculation": {"widths": list(WIDTHS)},
        }


def _text(response: dict[str, Any]) -> str:
    parts = (part for item in response["output"] for part in item.get("content", ()))
    return "".join(part.get("text", "") for part in parts)
