"""Cores: lists of them, a process that is bound to some, and who gets which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specinfer.cores import bind_process, format_cores, parse_cores, usable_cores, whole_cores
from specinfer.errors import InvalidRequest
from specinfer_cli.cores import share_cores
from specinfer_verify.settings import Settings

needs_binding = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system binds no process"
)


def test_lists_of_cores() -> None:
    for text, cores in (
        ("", ()),
        ("3", (3,)),
        ("0-2", (0, 1, 2)),
        (" 8, 0-1 ,4-4 ", (0, 1, 4, 8)),
    ):
        assert parse_cores(text) == cores
        assert parse_cores(format_cores(cores)) == cores
    assert format_cores((5, 0, 1, 2)) == "0-2,5"


@pytest.mark.parametrize(
    "text", ["x", "1-", "-1", "3-1", "1,,2", "0,0", "0-2,1", "4096", "1-99999", "²"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_cores(text)
    assert caught.value.field == "cores"


def test_settings_know_their_cores() -> None:
    assert Settings(Path("m"), cores="2-3").core_numbers == (2, 3)
    Settings(Path("m"), cores="0-3", threads=4)
    with pytest.raises(InvalidRequest, match="cores"):
        Settings(Path("m"), cores="0-3x")
    with pytest.raises(InvalidRequest, match="turns"):
        Settings(Path("m"), cores="0-1", threads=3)


def test_threads_that_no_machine_can_start_are_refused() -> None:
    Settings(Path("m"), threads=1024)
    for threads in (-1, 1025, 100_000):
        with pytest.raises(InvalidRequest, match="0 to 1024") as caught:
            Settings(Path("m"), threads=threads)
        assert caught.value.field == "threads"


@needs_binding
def test_cores_that_are_not_here_are_refused() -> None:
    before = os.sched_getaffinity(0)
    for cores in ((4095,), (min(before), 4095), ()):
        with pytest.raises(InvalidRequest, match="may use") as caught:
            bind_process(cores)
        assert caught.value.field == "cores"
    assert os.sched_getaffinity(0) == before


# Threads that are there already are bound too, and torch computes with one thread a core.
_BOUND = """
import os, sys, threading
release = threading.Event()
seen = []
def work():
    release.wait()
    seen.append(os.sched_getaffinity(0))
thread = threading.Thread(target=work)
thread.start()
from specinfer_engine.threads import take_cores
take_cores((int(sys.argv[1]),), 0)
release.set()
thread.join()
import torch
print(os.sched_getaffinity(0) | seen[0], torch.get_num_threads(), torch.get_num_interop_threads())
"""


@needs_binding
def test_a_process_is_bound_with_all_of_its_threads() -> None:
    core = usable_cores()[-1]
    command = [sys.executable, "-c", _BOUND, str(core)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == f"{{{core}}} 1 1"


def test_hardware_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for core, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr("specinfer.cores._TOPOLOGY", tmp_path)
    assert whole_cores(range(4)) == (0, 1)
    assert whole_cores((2, 3)) == (2, 3)
    assert whole_cores((7, 8)) == (7, 8)  # a system that does not say


def test_each_worker_gets_cores_of_its_own_where_there_are_enough() -> None:
    shares = share_cores(tuple(range(8)), 2, 1)
    assert (shares.verify, shares.draft) == (((0, 1, 2), (3, 4, 5)), ((6, 7),))
    assert (shares.verify_threads, shares.draft_threads, shares.num_threads) == (3, 1, 7)
    alone = share_cores((4, 5), 1, 0)
    assert (alone.verify, alone.draft, alone.apart) == (((4, 5),), (), True)
    said = share_cores(tuple(range(6)), 1, 2, 2)
    assert (said.verify, said.draft) == (((0, 1),), ((2, 3), (4, 5)))


@pytest.mark.parametrize("workers", [(1, 0), (1, 1), (2, 1), (3, 4)])
@pytest.mark.parametrize("num_threads", [None, 1, 3])
def test_cores_are_never_given_twice(workers: tuple[int, int], num_threads: int | None) -> None:
    for num_cores in range(1, 40):
        shares = share_cores(tuple(range(num_cores)), *workers, num_threads)
        given = [core for worker in (*shares.verify, *shares.draft) for core in worker]
        assert (len(shares.verify), len(shares.draft)) == workers
        assert len(set(given)) == len(given)
        assert len(given) == (num_cores if shares.apart else 0)
        assert not shares.apart or shares.num_threads <= num_cores


def test_fewer_threads_than_cores_run_wherever_cores_are_idle() -> None:
    """Else two clusters of one machine would meet on its first cores."""
    shares = share_cores(tuple(range(16)), 1, 1, 4)
    assert not shares.apart
    assert (shares.verify, shares.draft) == (((),), ((),))
    assert (shares.verify_threads, shares.draft_threads) == (4, 4)
    assert share_cores(tuple(range(8)), 1, 1, 4).apart


def test_few_cores_are_shared() -> None:
    shares = share_cores((0, 1), 1, 1)
    assert not shares.apart
    assert (shares.verify_threads, shares.draft_threads) == (2, 1)
    assert share_cores((0,), 2, 1).verify_threads == 1
