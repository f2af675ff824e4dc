"""Kernels of specinfer: paged tree attention, KV moves, seeded sampling, row-invariant linear.

Each op is one name in four places: the op here, its definition in `reference`, a test and a bench.
The package imports torch and nothing of ours; it knows no model, session or scheduler.
"""

from specinfer_kernels.backends import Backend, available_backends, backend_name
from specinfer_kernels.errors import BackendUnavailableError, KernelInputError
from specinfer_kernels.kv_cache import compact_kv, copy_blocks, write_kv
from specinfer_kernels.packed_linear import PackedLinear, pack_linear, padded_rows
from specinfer_kernels.seeded_sampling import (
    ACCEPT,
    DRAFT,
    ORDER,
    RESIDUAL,
    TARGET,
    Purpose,
    counter_hash,
    gumbel_noise,
    sample_gumbel,
)
from specinfer_kernels.tree_attention import AttentionLayout, tree_attention

__all__ = [
    "ACCEPT",
    "DRAFT",
    "ORDER",
    "RESIDUAL",
    "TARGET",
    "AttentionLayout",
    "Backend",
    "BackendUnavailableError",
    "KernelInputError",
    "PackedLinear",
    "Purpose",
    "available_backends",
    "backend_name",
    "compact_kv",
    "copy_blocks",
    "counter_hash",
    "gumbel_noise",
    "pack_linear",
    "padded_rows",
    "sample_gumbel",
    "tree_attention",
    "write_kv",
]
