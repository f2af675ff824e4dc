"""llama.cpp: plain, with a drafted chain, and its own example that drafts a tree.

Plain and chain run through a small driver that keeps the models loaded and takes token ids; the
tree is drafted by llama.cpp's program `llama-speculative` as it is, which loads the models for each
prompt and tells its own times, loading left out. The KV cache is float16, llama.cpp's default.
`python -m specinfer_bench.peers.build_llama_cpp` builds both; this module only runs them.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from specinfer.errors import Unavailable
from specinfer_bench.peers.build_llama_cpp import DRIVER, TREE, built_folder
from specinfer_bench.peers.gguf_file import cached_gguf
from specinfer_bench.peers.peer import Answer, Arm, Pair, Task

_CHAINS = (3, 8)  # its default, and as many nodes as our drafter likes to guess at most questions
_TREE_TOKENS, _TREE_BRANCHES = 8, 4
_TREE_SECONDS = 600.0
_CONTEXT = 2048


class LlamaCpp:
    """llama.cpp with the same weights in GGUF."""

    name = "llama.cpp"

    def missing(self) -> str | None:
        """A reason unless it was built here."""
        folder = built_folder()
        if all((folder / program).is_file() for program in (DRIVER, TREE)):
            return None
        return "not built: python -m specinfer_bench.peers.build_llama_cpp"

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Its arms.

        Raises:
            InvalidCheckpoint: when a checkpoint cannot be written as GGUF.
            Unavailable: when the driver does not come up.
        """
        target, draft = (cached_gguf(folder, pair.cache) for folder in (pair.target, pair.draft))
        forget_pages(target)
        models = ["-m", str(target), "-md", str(draft), "-t", str(pair.threads)]
        models += ["-td", str(pair.threads), "-c", str(_CONTEXT)]
        folder = built_folder()
        with running_driver([str(folder / DRIVER), *models]) as driver:
            arms = {"llama.cpp, plain": Arm(partial(driver.run, "plain", 0), plain=True)}
            for length in _CHAINS:
                arms[f"llama.cpp, chain of {length}"] = Arm(partial(driver.run, "chain", length))
            # Seen above temperature 0 with the whole vocabulary: it ends with a failed assertion.
            arms["llama.cpp, tree"] = Arm(
                partial(_run_tree, [str(folder / TREE), *models]), greedy_only=True
            )
            yield arms


def forget_pages(file: Path) -> None:
    """Ask the system to read a file from its disk again.

    llama.cpp computes on the pages of the file itself. Those that an earlier load left in memory
    would be the same ones again, as fast or as slow to read as before.
    """
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Driver:
    """The driver's process: a line in, a line out."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def wait_ready(self) -> None:
        """Return once the models are loaded; raises Unavailable when they are not."""
        line = self._line()
        if line != "ready":
            raise Unavailable(f"llama.cpp's driver did not start: {line or 'no answer'}")

    def run(self, mode: str, draft_max: int, task: Task) -> Answer:
        """Run a task; raises Unavailable when the driver has ended or answers with an error."""
        assert self._process.stdin is not None
        words = [mode, draft_max, task.max_tokens, task.temperature, task.seed]
        words += [len(task.token_ids), *task.token_ids]
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return read_answer(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def read_answer(line: str) -> Answer:
    """What a line of the driver says; raises Unavailable when it is an error or none."""
    kind, *rest = line.split() or [""]
    if kind != "ok" or len(rest) < 3:
        raise Unavailable(f"llama.cpp's driver: {line or 'has ended'}")
    token_ids = tuple(map(int, rest[3:]))
    if len(token_ids) != int(rest[2]):
        raise Unavailable("llama.cpp's driver: a line that was cut off")
    return Answer(len(token_ids), float(rest[1]), token_ids, float(rest[0]))


@contextmanager
def running_driver(command: list[str]) -> Iterator[Driver]:
    """A driver whose models are loaded, ended with the block; raises Unavailable."""
    # What it logs would fill a pipe that nobody reads.
    with subprocess.Popen(
        [*command, "--spec-type", "draft-simple", "--spec-draft-n-max", str(max(_CHAINS))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            driver = Driver(process)
            driver.wait_ready()
            yield driver
        finally:
            # It keeps nothing that a clean end would save.
            process.kill()


def _run_tree(command: list[str], task: Task) -> Answer:
    """One greedy prompt through `llama-speculative`."""
    # It stops after the first step that brings more than -n tokens.
    asked = ["-p", task.text, "-n", str(task.max_tokens - 1), "--temp", "0", "--no-escape"]
    asked += ["--spec-draft-n-max", str(_TREE_TOKENS), "-np", str(_TREE_BRANCHES)]
    asked += ["--top-k", "0", "-s", str(task.seed)]
    status, text = _ended([*command, *asked])
    if status:
        # Seen once in some seventy runs: it ended in the middle of a text.
        status, text = _ended([*command, *asked])
    if status:
        last = text.strip().rpartition("\n")[2]
        raise Unavailable(f"llama-speculative ended with {status} twice, last with: {last}")
    return read_tree_report(text, task)


def _ended(command: list[str]) -> tuple[int, str]:
    """A program's exit status, or less than 0 for a signal, and what it printed.

    Raises:
        Unavailable: when it does not end.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TREE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"llama-speculative took more than {_TREE_SECONDS:.0f} s") from error
    text = (done.stdout + done.stderr).decode(errors="replace")
    # Whatever its status, without its report it has not done what it was asked.
    return done.returncode or int(_DECODED.search(text) is None), text


_ENCODED = re.compile(r"encoded +(\d+) tokens in +([\d.]+) seconds")
_DECODED = re.compile(r"decoded +(\d+) tokens in +([\d.]+) seconds")


def read_tree_report(text: str, task: Task) -> Answer:
    """Tokens and times that `llama-speculative` printed; raises Unavailable when it did not.

    Raises:
        Unavailable: also when it cut the prompt into another number of tokens than ours.
    """
    encoded, decoded = _ENCODED.search(text), _DECODED.search(text)
    if encoded is None or decoded is None:
        raise Unavailable(f"llama-speculative: {text[-500:]}")
    if int(encoded[1]) != len(task.token_ids):
        raise Unavailable(
            f"llama-speculative took the prompt for {encoded[1]} tokens, not {len(task.token_ids)}"
        )
    return Answer(int(decoded[1]), float(encoded[2]) + float(decoded[2]))
