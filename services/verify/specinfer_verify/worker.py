"""Builds a verify worker's parts from its settings: model, pool, engine, description.

Slow and heavy: it imports torch and reads the checkpoint. It knows nothing of gRPC.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from specinfer import __version__
from specinfer.messages import WorkerInfo
from specinfer.prefixes import PrefixChanges
from specinfer.step_curve import StepCurve
from specinfer.worker_settings import AUTO
from specinfer_engine.blocks import BlockManager
from specinfer_engine.model import LoadedModel
from specinfer_engine.profiling import profile_steps
from specinfer_engine.served import load_runner
from specinfer_engine.step_profile import ProfileGrid
from specinfer_verify.checks import Limits
from specinfer_verify.engine import VerifyEngine
from specinfer_verify.settings import Settings

ACCEPTANCE_RULES = ("match",)
MEASURED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
MEASURED_CONTEXTS = (128, 1024, 4096)


@dataclass(frozen=True)
class Worker:
    """A model with the engine that serves it and what to tell others of it.

    `prefixes` notes what the KV pool can find again, where there is a Redis to be told of it.
    """

    loaded: LoadedModel
    engine: VerifyEngine
    info: WorkerInfo
    prefixes: PrefixChanges | None = None


def build_worker(settings: Settings, on_failure: Callable[[], None] | None = None) -> Worker:
    """Load the model, size its pool and measure its passes; the engine is not started.

    Raises:
        InvalidCheckpoint: when the folder cannot be served.
        InvalidRequest: when settings contradict each other, a core is not there, or the pool does
            not fit in memory.
    """
    runner = load_runner(settings)
    loaded = runner.loaded
    prefixes = PrefixChanges() if settings.redis else None
    blocks = BlockManager(
        runner.num_blocks, settings.block_size, model_hash=loaded.model_hash, changes=prefixes
    )
    limits = _limits(settings, loaded)
    rows = tuple(count for count in MEASURED_ROWS if count <= settings.max_rows)
    profile = profile_steps(runner, ProfileGrid(rows, MEASURED_CONTEXTS), settings.profile)
    costs = profile.costs
    on_gpu = loaded.device.type == "cuda"  # a CPU draws for visited nodes only
    engine = VerifyEngine(
        runner,
        blocks,
        limits,
        walk_on_device=on_gpu,
        on_failure=on_failure,
    )
    if settings.gather == AUTO:
        engine.gather_with(StepCurve(costs))
    if settings.goes_ahead:
        engine.run_ahead(StepCurve(costs))
    info = WorkerInfo(
        worker_id=settings.worker_id or f"verify-{uuid.uuid4().hex[:12]}",
        model_name=loaded.name,
        model_hash=loaded.model_hash,
        tokenizer_hash=loaded.tokenizer_hash,
        vocab_size=loaded.vocab_size,
        dtype=loaded.dtype_name,
        device=str(loaded.device),
        max_model_len=engine.limits.max_model_len,
        max_sessions=settings.max_sessions,
        max_tree_nodes=settings.max_tree_nodes,
        num_blocks=runner.num_blocks,
        block_size=settings.block_size,
        row_invariant=loaded.row_invariant,
        acceptance_rules=ACCEPTANCE_RULES,
        step_costs=costs,
        version=__version__,
        kv_dtype=loaded.kv_dtype_name,
        costs_measured_at=profile.measured_at,
    )
    return Worker(loaded, engine, info, prefixes)


def _limits(settings: Settings, loaded: LoadedModel) -> Limits:
    """What a session may be of this model."""
    return Limits(
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        max_sessions=settings.max_sessions,
        max_tree_nodes=settings.max_tree_nodes,
        max_rows=settings.max_rows,
        min_prefill_rows=settings.min_prefill_rows,
        yield_seconds=settings.yield_seconds,
        starve_seconds=settings.starve_seconds,
        silent_seconds=settings.silent_seconds,
        session_idle_seconds=settings.session_idle_seconds,
        end_token_ids=frozenset(loaded.eos_token_ids),
    )
