"""A whole Llama-like decoder as one op: tokens go in and logits come out.

The decoder is described once, at load, and a pass brings its rows. On a CPU all of it is one call
of C++ which runs the functions of the single ops, so that it has their bits and none of their
overhead; anything else runs those ops one by one. Knows no model: a decoder is its weights.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specinfer_kernels import native_decoder, native_rows, reference_decoder
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.decoder_rows import HeadNorms
from specinfer_kernels.errors import BackendUnavailableError, KernelInputError
from specinfer_kernels.kv_cache import check_scales
from specinfer_kernels.packed_linear import PackedLinear
from specinfer_kernels.reference import FLOAT8
from specinfer_kernels.tree_attention import AttentionLayout


@dataclass(frozen=True)
class RowNorm:
    """Root mean square normalisation of rows: weight [width], epsilon added to the mean square."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: attention and a gated product, each behind a norm and added to what came in.

    Attributes:
        attention_norm, mlp_norm: before each half, of the width of the rows.
        head_norms: over each query and key (Qwen 3), or None.
        query_key_value: rows to queries, keys and values side by side.
        output: attended heads to rows.
        gate_up: rows to gates and the values they open, side by side.
        down: those to rows.
        scale: factor on the scores.
        sliding_window: keys that a row sees, or None for all.
        softcap: cap on the scores, or None.
    """

    attention_norm: RowNorm
    head_norms: HeadNorms | None
    query_key_value: PackedLinear
    output: PackedLinear
    mlp_norm: RowNorm
    gate_up: PackedLinear
    down: PackedLinear
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def products(self) -> tuple[PackedLinear, ...]:
        """The four products, in the order in which they run."""
        return self.query_key_value, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class DecoderStack:
    """A decoder, all layers with the same heads; made once, at load.

    embedding: contiguous [vocab_size, width]. cosines, sines: [num_positions, head_dim], for the
    rotary positions of every layer. final_norm, head: what makes logits of the last layer's rows.

    Raises KernelInputError when widths, dtypes or devices do not fit together.
    """

    embedding: Tensor
    cosines: Tensor
    sines: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: RowNorm
    head: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise KernelInputError("a decoder has at least one layer")
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or (
            self.num_heads % self.num_kv_heads or self.head_dim % 2
        ):
            raise KernelInputError(
                f"{self.num_heads} heads of {self.head_dim} cannot read "
                f"{self.num_kv_heads} kv heads"
            )
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)
        self._check_ends()

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.layers[0].query_key_value.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of rows, norms and caches."""
        return self.layers[0].query_key_value.dtype

    @cached_property
    def native(self) -> native_decoder.NativeStack | None:
        """The decoder as the C++ library reads it; None when that cannot run all of it."""
        return native_decoder.native_stack(self)

    def _check_layer(self, index: int, layer: DecoderLayer) -> None:
        width, query_width = self.width, self.num_heads * self.head_dim
        mixed_width = query_width + 2 * self.num_kv_heads * self.head_dim
        inner = layer.down.in_features
        expected = ((width, mixed_width), (query_width, width), (width, 2 * inner), (inner, width))
        found = tuple((item.in_features, item.out_features) for item in layer.products)
        if found != expected:
            raise KernelInputError(f"layer {index} has products {found}, expected {expected}")
        name = f"a norm of layer {index}"
        for norm in (layer.attention_norm, layer.mlp_norm):
            self._check_weight(name, norm.weight, (width,))
        if layer.head_norms is not None:
            for weight in (layer.head_norms.query, layer.head_norms.key):
                self._check_weight(name, weight, (self.head_dim,))
        if any(item.dtype != self.dtype for item in layer.products):
            raise KernelInputError(f"the products of layer {index} are not all of {self.dtype}")
        window, softcap = layer.sliding_window, layer.softcap
        if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
            raise KernelInputError(f"window and softcap of layer {index} must be positive")

    def _check_ends(self) -> None:
        self._check_weight("the last norm", self.final_norm.weight, (self.width,))
        self._check_weight("embedding", self.embedding, (self.embedding.shape[0], self.width))
        for name, table in (("cosines", self.cosines), ("sines", self.sines)):
            self._check_weight(name, table, (self.cosines.shape[0], self.head_dim))
        if self.head.in_features != self.width or self.head.dtype != self.dtype:
            raise KernelInputError(
                f"the head takes {self.head.dtype} [..., {self.head.in_features}], "
                f"rows are {self.dtype} [..., {self.width}]"
            )

    def _check_weight(self, name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
        if weight.device != self.embedding.device:
            raise KernelInputError(f"{name} is on {weight.device}, not {self.embedding.device}")
        if weight.shape != shape or weight.dtype != self.dtype or not weight.is_contiguous():
            raise KernelInputError(
                f"{name} must be a contiguous {self.dtype} {list(shape)}, "
                f"got {weight.dtype} {list(weight.shape)}"
            )


@dataclass(frozen=True)
class DecoderRows:
    """The rows of one pass. All on one device, the decoder's.

    token_ids, positions: int64 [num_rows]. slot_mapping: int64 [num_rows], distinct slots of the
    pool. wanted: int64 [num_wanted], rows whose logits are wanted, in any order. layout: of these
    rows, for attention.

    Shapes and dtypes are checked here: KernelInputError.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    wanted: Tensor
    layout: AttentionLayout

    def __post_init__(self) -> None:
        num_rows = self.layout.ancestors.shape[0]
        for name, size in (
            ("token_ids", num_rows),
            ("positions", num_rows),
            ("slot_mapping", num_rows),
            ("wanted", None),
        ):
            tensor: Tensor = getattr(self, name)
            fits = tensor.dim() == 1 and size in (None, tensor.shape[0])
            if not fits or tensor.dtype != torch.int64 or not tensor.is_contiguous():
                raise KernelInputError(
                    f"{name} must be int64 [{'any' if size is None else size}], "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != self.layout.ancestors.device:
                raise KernelInputError(f"{name} and the layout are on different devices")


@dataclass(frozen=True)
class LayerCaches:
    """Key and value cache of each layer of a pool, for all passes over it.

    pairs: contiguous [num_blocks, block_size, num_kv_heads, head_dim], all of one shape, dtype and
    device. Checked here, once for a pool: KernelInputError.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        tensors = [tensor for pair in self.pairs for tensor in pair]
        kinds = {(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors}
        if len(kinds) != 1 or tensors[0].dim() != 4:
            raise KernelInputError("the caches of a pool must have one 4-dimensional shape")
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise KernelInputError("the caches must be contiguous")

    @cached_property
    def native(self) -> native_decoder.NativeCaches:
        """Where the caches are, as the C++ library reads it."""
        return native_decoder.native_caches(self.pairs)


def decoder_logits(
    rows: DecoderRows,
    stack: DecoderStack,
    caches: LayerCaches,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Take rows through the decoder, writing their keys and values on the way.

    caches: one pair a layer, of the stack's dtype or of float8_e4m3fn at scale 1, which the single
    ops serve. Returns the logits of `rows.wanted`, float32 [num_wanted, vocab_size], values of the
    stack's dtype; those of a float64 stack as float64. Which rows share the pass changes no row's
    bits on a CPU or where Triton serves, as with the ops that it is made of, whose bits it has.

    Raises KernelInputError on a wrong shape, dtype, device or range, BackendUnavailableError when
    `backend` is named and cannot serve.
    """
    _check(rows, stack, caches)
    dtype, device = caches.pairs[0][0].dtype, stack.embedding.device
    if backend is None:
        native = stack.native if device.type == "cpu" and dtype != FLOAT8 else None
    elif choose_backend(device, backend, dtype, native_rows.DTYPE_CODES) == "native":
        native = stack.native
        if native is None:
            raise BackendUnavailableError("the native library does not run all of this decoder")
    else:
        native = None
    if native is None:
        return reference_decoder.decoder_logits(rows, stack, caches.pairs)
    # The defaults of torch are the whole process's, and somebody may be loading another model.
    shape = (rows.wanted.shape[0], stack.head.out_features)
    logits = torch.empty(shape, dtype=torch.float32, device="cpu")
    native_decoder.decoder_logits(rows, native, caches.native, logits)
    return logits


def _check(rows: DecoderRows, stack: DecoderStack, caches: LayerCaches) -> None:
    cache = caches.pairs[0][0]
    heads = (stack.num_kv_heads, stack.head_dim)
    if len(caches.pairs) != len(stack.layers) or cache.shape[2:] != heads:
        raise KernelInputError(
            f"the caches must be of {len(stack.layers)} layers and {heads}, "
            f"got {len(caches.pairs)} and {list(cache.shape[2:])}"
        )
    if 0 in cache.shape:
        raise KernelInputError("a cache of no block holds nothing")
    check_scales(stack.dtype, cache.dtype, 1.0, 1.0)
    if not stack.embedding.device == cache.device == rows.token_ids.device:
        raise KernelInputError("rows, decoder and caches are on different devices")
