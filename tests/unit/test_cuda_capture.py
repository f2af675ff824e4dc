"""What CudaCapture does around a recording, with a stand-in for the functions of torch.cuda."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch

from specinfer_engine import graphs
from specinfer_engine.graphs import CaptureFailed, CudaCapture

TIMEOUT = 30.0
# How long a recording is held open for another thread that must not come.
OVERLAP_SECONDS = 0.2


class FakeStream:
    """Waits for nobody."""

    def __init__(self, device: object = None) -> None:
        self.num_waits = 0

    def wait_stream(self, stream: FakeStream) -> None:
        """Count it."""
        self.num_waits += 1


class FakeGraph:
    """Replays nothing."""

    def replay(self) -> None:
        """Nothing."""


class FakeCuda:
    """The part of torch.cuda that is used; a recording that fails keeps its stream, as there."""

    Stream = FakeStream
    CUDAGraph = FakeGraph

    def __init__(self) -> None:
        self._threads = threading.local()
        self.first_stream = FakeStream()
        self.num_begun = 0

    def current_stream(self) -> FakeStream:
        """This thread's."""
        stream: FakeStream = getattr(self._threads, "stream", self.first_stream)
        return stream

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Makes it this thread's."""
        before = self.current_stream()
        self._threads.stream = stream
        try:
            yield
        finally:
            self._threads.stream = before

    def device(self, device: torch.device) -> nullcontext[None]:
        """There is one."""
        return nullcontext()

    def graph_pool_handle(self) -> None:
        """There is none."""

    @contextmanager
    def graph(
        self, graph: FakeGraph, pool: None, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        """A recording."""
        assert capture_error_mode == "thread_local"
        self.num_begun += 1
        before = self.current_stream()
        self._threads.stream = stream
        yield
        self._threads.stream = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.graph_pool_handle)
    return fake


def calls(*steps: Callable[[], object]) -> Callable[[], None]:
    """Does the next of `steps` each time."""
    left = iter(steps)

    def step() -> None:
        next(left)()

    return step


def nothing() -> None:
    """A pass."""


def fail() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_pass_is_run_twice_and_recorded_once(cuda: FakeCuda) -> None:
    capture = CudaCapture(torch.device("cpu"))
    seen = []
    replay = capture(lambda: seen.append(cuda.current_stream()))
    assert len(seen) == 3
    assert cuda.first_stream not in seen
    assert cuda.num_begun == 1
    replay()
    assert len(seen) == 3


def test_a_recording_that_fails_gives_the_thread_its_stream_back(cuda: FakeCuda) -> None:
    capture = CudaCapture(torch.device("cpu"))
    with pytest.raises(CaptureFailed, match="not permitted"):
        capture(calls(nothing, nothing, fail))
    assert cuda.num_begun == 1
    assert cuda.current_stream() is cuda.first_stream
    capture(nothing)  # nor does it keep others from recording


def test_a_pass_that_waits_for_the_device_is_not_recorded(cuda: FakeCuda) -> None:
    number = torch.ones(())
    with pytest.raises(CaptureFailed, match="_local_scalar_dense"):
        CudaCapture(torch.device("cpu"))(calls(nothing, number.item))
    assert cuda.num_begun == 0
    assert cuda.current_stream() is cuda.first_stream
    assert cuda.first_stream.num_waits == 1, "what was begun ends before the pass is run plainly"


def recordings_overlap() -> bool:
    """Whether a second engine's thread comes into its pass while the first one's records."""
    first_records, second_came = threading.Event(), threading.Event()
    overlaps = []

    def hold() -> None:
        first_records.set()
        overlaps.append(second_came.wait(OVERLAP_SECONDS))

    def second() -> None:
        assert first_records.wait(TIMEOUT)
        CudaCapture(torch.device("cpu"))(second_came.set)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        CudaCapture(torch.device("cpu"))(calls(nothing, nothing, hold))
        other.result(TIMEOUT)
    return overlaps == [True]


def test_two_engines_record_one_after_the_other(cuda: FakeCuda) -> None:
    assert not recordings_overlap()


def test_negative_control_without_the_lock(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_RECORDING", nullcontext())
    assert recordings_overlap()
