"""Builds a draft worker's parts from its settings: model, pool, drafter, engine, description.

Slow and heavy: it imports torch and reads the checkpoint. It knows nothing of gRPC.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from specinfer import __version__
from specinfer.grammar import GrammarChecker, GrammarCompiler
from specinfer.messages import WorkerInfo
from specinfer_draft.drafters.limits import DrafterLimits
from specinfer_draft.drafters.model import ModelDrafter
from specinfer_draft.drafters.static_growth import StaticGrowths
from specinfer_draft.engine import DraftEngine
from specinfer_draft.grow import Thrift
from specinfer_draft.settings import Settings
from specinfer_engine.blocks import BlockManager
from specinfer_engine.model import LoadedModel
from specinfer_engine.profiling import profile_steps
from specinfer_engine.runner import Runner
from specinfer_engine.served import load_runner
from specinfer_engine.step_profile import ProfileGrid

MEASURED_ROWS = (1, 4, 16, 64)
MEASURED_CONTEXTS = (256,)


@dataclass(frozen=True)
class Worker:
    """An engine over a model, its grammars, and what to tell others of it."""

    engine: DraftEngine
    info: WorkerInfo
    grammars: GrammarChecker


def build_worker(settings: Settings, on_failure: Callable[[], None] | None = None) -> Worker:
    """Load the model, size its pool and measure its passes; the engine is not started.

    Raises:
        InvalidCheckpoint: when the folder cannot be served.
        InvalidRequest: when settings contradict each other, a core is not there, or the pool does
            not fit in memory.
    """
    runner = load_runner(settings)
    loaded = runner.loaded
    blocks = BlockManager(runner.num_blocks, settings.block_size, model_hash=loaded.model_hash)
    limits = DrafterLimits(
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        max_sessions=settings.max_sessions,
        max_tree_nodes=settings.max_tree_nodes,
        max_rows=settings.max_rows,
        prefill_rows=settings.prefill_rows,
        thrift=Thrift(settings.score_floor, settings.least_reach),
        spread=settings.spread,
        ahead=settings.goes_ahead,
    )
    info = _describe(settings, loaded, runner)
    drafter = ModelDrafter(
        runner, blocks, limits, device=loaded.device, growths=_make_growths(runner, limits)
    )
    return Worker(DraftEngine(drafter, blocks, on_failure=on_failure), info, _make_grammars(loaded))


def _make_growths(runner: Runner, limits: DrafterLimits) -> StaticGrowths | None:
    """Whole trees are worth it where launches cost more than what they compute: on a GPU."""
    if runner.graphs is None:
        return None
    return StaticGrowths(
        runner.graphs,
        limits.vocab_size,
        runner.loaded.device,
        spread=limits.spread,
        most_rows=limits.max_rows,
    )


def _make_grammars(loaded: LoadedModel) -> GrammarChecker:
    tokenizer_json = loaded.tokenizer_files.tokenizer_json
    return GrammarChecker(GrammarCompiler(tokenizer_json, loaded.vocab_size, loaded.eos_token_ids))


def _describe(settings: Settings, loaded: LoadedModel, runner: Runner) -> WorkerInfo:
    rows = tuple(count for count in MEASURED_ROWS if count <= settings.max_rows)
    profile = profile_steps(runner, ProfileGrid(rows, MEASURED_CONTEXTS), settings.profile)
    return WorkerInfo(
        worker_id=settings.worker_id or f"draft-{uuid.uuid4().hex[:12]}",
        model_name=loaded.name,
        model_hash=loaded.model_hash,
        tokenizer_hash=loaded.tokenizer_hash,
        vocab_size=loaded.vocab_size,
        dtype=loaded.dtype_name,
        device=str(loaded.device),
        max_model_len=min(loaded.max_model_len, runner.num_blocks * settings.block_size),
        max_sessions=settings.max_sessions,
        max_tree_nodes=settings.max_tree_nodes,
        num_blocks=runner.num_blocks,
        block_size=settings.block_size,
        row_invariant=loaded.row_invariant,
        step_costs=profile.costs,
        version=__version__,
        kv_dtype=loaded.kv_dtype_name,
        costs_measured_at=profile.measured_at,
    )
