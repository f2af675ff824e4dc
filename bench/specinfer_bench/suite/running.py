"""Runs parts one after the other, each as a process that cannot take the others with it.

A part that fails or hangs is told of with its reason, and the next one runs. This module knows
nothing of what parts measure.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from specinfer.errors import SpecinferError
from specinfer_bench.machine import commit_of, machine_facts
from specinfer_bench.suite.parts import Part
from specinfer_bench.suite.sharing import SharedCluster

DONE, FAILED, TIMED_OUT, LEFT_OUT = "done", "failed", "timed out", "left out"
# Less time than this is not worth starting anything in.
LEAST_SECONDS = 20.0
END_SECONDS = 15.0
LOOK_SECONDS = 0.5
KEPT_LINES = 200
KEPT_CHARACTERS = 200
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class PartResult:
    """How a part went.

    Attributes:
        title: of the part.
        command: as others would write it.
        state: done, failed, timed out or left out.
        reason: why it is not done, or "".
        seconds: how long it ran.
        busy_cores: cores that other work kept busy just before it began.
        commit: what ran, or "" where that is not known.
    """

    title: str
    command: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    busy_cores: float = 0.0
    commit: str = ""


def run_parts(
    parts: Sequence[Part],
    root: Path,
    results: Path,
    budget_seconds: float,
    tell: Callable[[str], None] = lambda _: None,
) -> Generator[tuple[str, PartResult]]:
    """Run the parts in order while there is time; yields each one's name and how it went.

    Args:
        parts: what to run.
        root: folder in which the commands run.
        results: folder for the files that they leave, below `root`.
        budget_seconds: for all of them.
        tell: told of each part as it begins and ends.
    """
    deadline = time.monotonic() + budget_seconds
    with closing(SharedCluster()) as shared:
        for part in parts:
            tell(f"{part.name}: {part.title}")
            commit = commit_of(root)
            result = run_part(part, root, results, deadline, shared)
            if result.state != DONE:
                # Whatever it was, the next one does not meet it.
                shared.close()
            tell(f"  {result.state}, {result.seconds:.0f} s")
            yield part.name, replace(result, commit=commit)


def run_part(
    part: Part, root: Path, results: Path, deadline: float, shared: SharedCluster
) -> PartResult:
    """Run one part, until a moment of time.monotonic() and for at most its limit.

    A cluster that is started for it counts to its seconds and not to its limit. Its file is written
    beside that of the last run, which stays until there is a whole new one.
    """
    output = results / f"{part.name}.json"
    made = output.with_name(f".{output.name}")
    command = shlex.join((*part.command, *_writing(part, output, root)))
    begun = time.monotonic()
    if deadline - begun < LEAST_SECONDS:
        return PartResult(part.title, command, LEFT_OUT, "the time was up before it")
    busy = busy_cores(LOOK_SECONDS)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            joined = shared.joined(part, deadline - time.monotonic())
            # One of a run that was broken off would pass for today's.
            made.unlink(missing_ok=True)
            words = (*joined, *_writing(part, made, root))
            state, reason = _run_in_time(part, words, root, deadline, said)
        except SpecinferError as error:
            late = deadline - time.monotonic() < LEAST_SECONDS
            state, reason = LEFT_OUT if late else FAILED, error.message
        # Where the files were on this machine is nobody's business.
        printed = [line.replace(f"{root}{os.sep}", "") for line in _lines(said)]
    if state == DONE:
        ran = {"command": command, "grow": part.grow, "shared_cluster": shared.had_answered}
        state, reason = _kept(part, ran, printed, busy, made)
    elif printed:
        reason = f"{reason}: {printed[-1]}"[:REASON_CHARACTERS]
    if state == DONE:
        made.replace(output)
    made.unlink(missing_ok=True)
    took = round(time.monotonic() - begun, 1)
    return PartResult(part.title, command, state, reason, took, busy)


def _writing(part: Part, output: Path, root: Path) -> tuple[str, ...]:
    """What a part's command ends with where it writes its file itself."""
    return ("--output", str(output.relative_to(root))) if part.writes else ()


def _run_in_time(
    part: Part, words: Sequence[str], root: Path, deadline: float, said: IO[str]
) -> tuple[str, str]:
    """How a part's command went, and why not well."""
    left = deadline - time.monotonic()
    if left < LEAST_SECONDS:
        return LEFT_OUT, "the time was up before it"
    state, reason = _run(_resolved(words), root, min(left, part.limit_seconds), said)
    if state == TIMED_OUT and left < part.limit_seconds:
        return LEFT_OUT, "the time was up within it"
    return state, reason


def _kept(
    part: Part, ran: Mapping[str, object], printed: Sequence[str], busy: float, output: Path
) -> tuple[str, str]:
    """Have a part's file say how it `ran`; how the part went then, and why not well."""
    if not part.writes:
        _write_printed(printed, str(ran["command"]), busy, output)
        return DONE, ""
    if not output.is_file():
        return FAILED, "it left no file"
    try:
        document = json.loads(output.read_text(encoding="utf-8"))
        document["setup"] = {**document.get("setup", {}), **ran}
    except (ValueError, TypeError, AttributeError) as error:
        return FAILED, f"its file is none of ours: {error}"
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return DONE, ""


def busy_cores(seconds: float) -> float:
    """Cores that were busy on this machine while we waited; 0.0 where it does not tell."""
    before = _processor_seconds()
    time.sleep(seconds)
    after = _processor_seconds()
    return round(max(0.0, (after - before) / seconds), 1)


def _processor_seconds() -> float:
    """Processor time of all cores since the start, without that of idling or waiting for disks."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = (int(each) for each in line.split()[1:9])
    ticks = user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def _resolved(words: Sequence[str]) -> list[str]:
    """The command with this interpreter, or the script that is installed beside it."""
    first = sys.executable if words[0] == "python" else str(Path(sys.executable).parent / words[0])
    return [first, *words[1:]]


def _run(command: Sequence[str], root: Path, seconds: float, said: IO[str]) -> tuple[str, str]:
    """How it ended, and why not well."""
    try:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return FAILED, str(error)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"not within {seconds:.0f} seconds"
    finally:
        _end(process)
    return (DONE, "") if status == 0 else (FAILED, f"exit status {status}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part: its whole process group, first kindly."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            return


def _lines(said: IO[str]) -> list[str]:
    said.seek(0)
    lines = [line.rstrip()[:KEPT_CHARACTERS] for line in said if line.strip()]
    return lines[-KEPT_LINES:]


def _write_printed(printed: Sequence[str], command: str, busy: float, output: Path) -> None:
    """Write what a part printed as its file."""
    setup = {"command": command, "machine": machine_facts(), "busy_cores": busy}
    text = json.dumps({"lines": printed, "setup": setup}, indent=2)
    output.write_text(text + "\n", encoding="utf-8")
