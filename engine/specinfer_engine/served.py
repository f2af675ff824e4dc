"""A model with its pool from a worker's settings, for both tiers. Knows no session and no tree."""

from __future__ import annotations

from specinfer.errors import InvalidRequest
from specinfer.worker_settings import AUTO, WorkerSettings
from specinfer_engine.graphs import capture_for
from specinfer_engine.loader import load_model
from specinfer_engine.runner import Runner
from specinfer_engine.threads import take_cores


def load_runner(settings: WorkerSettings) -> Runner:
    """Take the cores, load the model and size its pool.

    Raises:
        InvalidCheckpoint: when the folder cannot be served.
        InvalidRequest: when a core is not there, the device cannot have such keys and values, or
            the pool does not fit in memory.
    """
    take_cores(settings.core_numbers, settings.threads)
    loaded = load_model(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        name=settings.name or None,
        weights=settings.weights,
        kv_dtype=settings.kv_dtype,
    )
    num_blocks = settings.num_blocks(loaded.kv_bytes_per_token)
    try:
        return Runner(
            loaded,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            capture=capture_for(settings.cuda_graphs == AUTO, loaded.device, loaded.dtype),
        )
    except (RuntimeError, MemoryError) as error:
        size = num_blocks * settings.block_size * loaded.kv_bytes_per_token >> 20
        raise InvalidRequest(
            f"a KV pool of {size} MiB does not fit in memory: {error}", field="kv_memory"
        ) from error
