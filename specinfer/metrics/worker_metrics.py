"""What draft and verify workers count; every name is the catalogue's.

An engine calls these on its own thread, once a pass and never once a token. This module knows
nothing of models, trees or sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry

from specinfer.messages import WorkerInfo
from specinfer.metrics.instruments import Instruments, Read
from specinfer.metrics.metric import Source
from specinfer.metrics.vllm import VllmAliases
from specinfer.step_curve import StepCurve


class Pool(Protocol):
    """What is shown of a KV pool; every property may be read from any thread."""

    num_blocks: int
    num_tokens_sought: int
    num_tokens_found: int

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        ...

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that hold a prefix nobody uses at the moment."""
        ...


class WorkerMetrics:
    """What both kinds of worker count. All metrics carry `model_name` and `tier`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        source: Source,
        info: WorkerInfo,
        *,
        vllm_names: bool = False,
    ) -> None:
        """Register everything; a registry takes one worker.

        Args:
            registry: what is exposed.
            source: which tier it is.
            info: what the worker is.
            vllm_names: show what vLLM has too under vLLM's names as well.
        """
        fixed = {"model_name": info.model_name, "tier": source.value}
        self._instruments = Instruments(registry, source, fixed)
        named: dict[tuple[str, ...], float] = {(info.version, source.value, info.model_hash): 1.0}
        self._instruments.watch("build_info", lambda: named)
        self._step_seconds = self._instruments.histogram("step_seconds").of()
        self._step_rows = self._instruments.histogram("step_rows").of()
        self._step_sessions = self._instruments.histogram("step_sessions").of()
        rows = self._instruments.counter("rows")
        self._prefill, self._roots, self._guesses = map(rows.of, ("prefill", "root", "guess"))
        if vllm_names:
            registry.register(VllmAliases(self._instruments))

    def observe_pass(
        self, seconds: float, *, num_sessions: int, num_prefill: int, num_roots: int, num_rows: int
    ) -> None:
        """Count one pass; rows that are neither prefill nor roots are guesses."""
        self._step_seconds.observe(seconds)
        self._step_rows.observe(num_rows)
        self._step_sessions.observe(num_sessions)
        self._prefill.inc(num_prefill)
        self._roots.inc(num_roots)
        self._guesses.inc(num_rows - num_prefill - num_roots)

    def watch(self, name: str, read: Read) -> None:
        """Ask `read` for a metric at each scrape, by the values of its labels in order."""
        self._instruments.watch(name, read)

    def watch_one(self, name: str, read: Callable[[], float]) -> None:
        """Ask `read` for a metric without labels of its own at each scrape."""
        self._instruments.watch_one(name, read)

    def watch_pool(self, pool: Pool) -> None:
        """Ask for the state of a KV pool, and what its prefixes were good for, at each scrape."""

        def by_state() -> dict[tuple[str, ...], float]:
            cached, available = pool.num_cached_blocks, pool.num_free_blocks
            used = pool.num_blocks - available
            return {("used",): used, ("cached",): cached, ("free",): available - cached}

        self.watch("kv_blocks", by_state)
        self.watch_one("kv_cache_usage_ratio", lambda: by_state()["used",] / pool.num_blocks)
        self.watch_one("prefix_cache_queries", lambda: pool.num_tokens_sought)
        self.watch_one("prefix_cache_hits", lambda: pool.num_tokens_found)


class VerifyMetrics(WorkerMetrics):
    """What a verify worker counts."""

    def __init__(
        self, registry: CollectorRegistry, info: WorkerInfo, *, vllm_names: bool = False
    ) -> None:
        super().__init__(registry, Source.VERIFY, info, vllm_names=vllm_names)
        self._curve = StepCurve(info.step_costs) if info.step_costs else None
        self._ratio = self._instruments.histogram("step_cost_ratio").of()

    def observe_pass(
        self, seconds: float, *, num_sessions: int, num_prefill: int, num_roots: int, num_rows: int
    ) -> None:
        """Count one pass, and how it compares with what the worker measured of itself."""
        super().observe_pass(
            seconds,
            num_sessions=num_sessions,
            num_prefill=num_prefill,
            num_roots=num_roots,
            num_rows=num_rows,
        )
        if self._curve is not None:
            self._ratio.observe(seconds / self._curve.at(num_rows))


class DraftMetrics(WorkerMetrics):
    """What a draft worker counts."""

    def __init__(
        self, registry: CollectorRegistry, info: WorkerInfo, *, vllm_names: bool = False
    ) -> None:
        super().__init__(registry, Source.DRAFT, info, vllm_names=vllm_names)
        self._proposals = self._instruments.counter("proposals")
        self._tokens = self._instruments.counter("proposed_tokens").of()
        self._seconds = self._instruments.histogram("proposal_seconds").of()
        self._ahead = self._instruments.counter("ahead_trees")
        self._ahead_passes = self._instruments.counter("ahead_passes").of()
        self._ahead_rows = self._instruments.counter("ahead_rows").of()

    def observe_proposal(self, outcome: str, num_tokens: int, seconds: float) -> None:
        """Count one answered propose; see the catalogue for the outcomes."""
        self._proposals.of(outcome).inc()
        self._tokens.inc(num_tokens)
        self._seconds.observe(seconds)

    def observe_ahead(self, outcome: str) -> None:
        """Count a tree that was begun ahead, once it is known whether it can be used."""
        self._ahead.of(outcome).inc()

    def observe_ahead_pass(self, num_rows: int) -> None:
        """Count a pass for trees that nobody had asked for."""
        self._ahead_passes.inc()
        self._ahead_rows.inc(num_rows)
