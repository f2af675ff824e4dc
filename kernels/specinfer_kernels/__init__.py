"""Kernels of specinfer: paged tree attention, KV moves, decoder rows, seeded sampling, linear.

Each op is one name in four places: the op here, its definition in `reference`, a test and a bench.
The package imports torch and nothing of ours; it knows no model, session or scheduler.
"""

from specinfer_kernels.backends import (
    Backend,
    available_backends,
    backend_name,
    describe_backend,
)
from specinfer_kernels.decoder_logits import (
    DecoderLayer,
    DecoderRows,
    DecoderStack,
    LayerCaches,
    RowNorm,
    decoder_logits,
)
from specinfer_kernels.decoder_rows import (
    HeadNorms,
    RotaryPlaces,
    add_rms_norm,
    rms_norm,
    rotate_and_write_kv,
    silu_multiply,
)
from specinfer_kernels.errors import BackendUnavailableError, KernelInputError
from specinfer_kernels.kv_cache import compact_kv, copy_blocks, write_kv
from specinfer_kernels.law_sampling import Laws, sample_law
from specinfer_kernels.packed_linear import (
    PackedLinear,
    pack_linear,
    padded_rows,
    quantize_rows,
    round_to_int8,
)
from specinfer_kernels.seeded_sampling import (
    ACCEPT,
    DRAFT,
    ORDER,
    RESIDUAL,
    TARGET,
    Purpose,
    counter_hash,
    draw_row,
    gumbel_noise,
    sample_gumbel,
)
from specinfer_kernels.token_ranking import rank_tokens
from specinfer_kernels.tree_attention import AttentionLayout, split_length, tree_attention
from specinfer_kernels.tree_walk import walk_trees

__all__ = [
    "ACCEPT",
    "DRAFT",
    "ORDER",
    "RESIDUAL",
    "TARGET",
    "AttentionLayout",
    "Backend",
    "BackendUnavailableError",
    "DecoderLayer",
    "DecoderRows",
    "DecoderStack",
    "HeadNorms",
    "KernelInputError",
    "Laws",
    "LayerCaches",
    "PackedLinear",
    "Purpose",
    "RotaryPlaces",
    "RowNorm",
    "add_rms_norm",
    "available_backends",
    "backend_name",
    "compact_kv",
    "copy_blocks",
    "counter_hash",
    "decoder_logits",
    "describe_backend",
    "draw_row",
    "gumbel_noise",
    "pack_linear",
    "padded_rows",
    "quantize_rows",
    "rank_tokens",
    "rms_norm",
    "rotate_and_write_kv",
    "round_to_int8",
    "sample_gumbel",
    "sample_law",
    "silu_multiply",
    "split_length",
    "tree_attention",
    "walk_trees",
    "write_kv",
]
