"""A worker's pass costs at its start: remembered if they are still true, else measured.

This module knows nothing of the grid's points, of file formats or of who is told.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import specinfer_kernels
from specinfer.worker_settings import OFF, RENEW
from specinfer_engine.model import LoadedModel
from specinfer_engine.profile_cache import profile_key, read_profile, user_folder, write_profile
from specinfer_engine.runner import Runner
from specinfer_engine.step_profile import (
    ProfileGrid,
    StepProfile,
    measure_step_costs,
    still_true,
    warm_up,
)

# What is measured sooner than this is not worth a file.
WORTH_KEEPING_SECONDS = 0.5

log = logging.getLogger(__name__)


def profile_steps(
    runner: Runner, grid: ProfileGrid, how: str, folder: Path | None = None
) -> StepProfile:
    """Costs of the grid's points that fit into the runner's pool; see `measure_step_costs`.

    Args:
        runner: before any session opens.
        grid: the points wanted.
        how: KEEP takes what a folder has while it is still true, RENEW measures and keeps, OFF
            measures and touches no file.
        folder: where costs are kept; None takes the user's cache folder.
    """
    loaded = runner.loaded
    kernels = specinfer_kernels.describe_backend(loaded.device)
    log.info("kernels of all passes: %s", kernels, extra={"kernels": kernels})
    slots = min(runner.num_blocks * runner.block_size, loaded.max_model_len)
    grid = grid.within(slots)
    if runner.records_passes:
        warm_up(runner, grid)
    folder = None if how == OFF else folder or user_folder()
    if folder is None:
        return StepProfile(measure_step_costs(runner, grid), time.time())
    key = _key(loaded, grid, runner.block_size)
    known = None if how == RENEW else read_profile(folder, key)
    if known is not None and still_true(runner, known.costs):
        log.info("pass costs: %d points known from %s", len(known.costs), folder)
        return known
    start = time.perf_counter()
    profile = StepProfile(measure_step_costs(runner, grid), time.time())
    spent = time.perf_counter() - start
    log.info("pass costs: %d points measured in %.1f s", len(profile.costs), spent)
    if spent >= WORTH_KEEPING_SECONDS and profile.costs:
        write_profile(folder, key, profile)
    return profile


def _key(loaded: LoadedModel, grid: ProfileGrid, block_size: int) -> dict[str, str]:
    return profile_key(
        loaded, rows=grid.row_counts, contexts=grid.context_lens, block_size=block_size
    )
