"""All layers of a Llama-like decoder as one op: rows go in as embeddings and come out transformed.

The layers are described once, at load, and a pass brings its rows. On a CPU the whole loop over the
layers is one call of C++ which runs the functions of the single ops, so that it has their bits and
none of their overhead; anything else runs those ops one by one. Knows no model and no checkpoint:
a layer is its weights.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specinfer_kernels import native_decoder, native_rows, reference_decoder
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.decoder_rows import HeadNorms, RotaryPlaces
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
    """The layers of a decoder, all with the same heads; made once, at load.

    Raises KernelInputError when widths, dtypes or devices do not fit together.
    """

    layers: tuple[DecoderLayer, ...]
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
        """The layers as the C++ library reads them; None when it cannot run all of them."""
        return native_decoder.native_stack(self)

    def _check_layer(self, index: int, layer: DecoderLayer) -> None:
        width, query_width = self.width, self.num_heads * self.head_dim
        mixed_width = query_width + 2 * self.num_kv_heads * self.head_dim
        inner = layer.down.in_features
        expected = ((width, mixed_width), (query_width, width), (width, 2 * inner), (inner, width))
        found = tuple((item.in_features, item.out_features) for item in layer.products)
        if found != expected:
            raise KernelInputError(f"layer {index} has products {found}, expected {expected}")
        weights = [(layer.attention_norm.weight, width), (layer.mlp_norm.weight, width)]
        if layer.head_norms is not None:
            norms = layer.head_norms
            weights += [(norms.query, self.head_dim), (norms.key, self.head_dim)]
        for weight, size in weights:
            if weight.shape != (size,) or weight.dtype != self.dtype or not weight.is_contiguous():
                raise KernelInputError(
                    f"a norm of layer {index} must be {self.dtype} [{size}], "
                    f"got {weight.dtype} {list(weight.shape)}"
                )
        if any(item.dtype != self.dtype for item in layer.products):
            raise KernelInputError(f"the products of layer {index} are not all of {self.dtype}")
        window, softcap = layer.sliding_window, layer.softcap
        if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
            raise KernelInputError(f"window and softcap of layer {index} must be positive")


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
    def pointers(self) -> native_decoder.CachePointers:
        """Where the caches are, as the C++ library reads it."""
        return native_decoder.cache_pointers(self.pairs)


def decoder_layers(
    hidden: Tensor,
    stack: DecoderStack,
    places: RotaryPlaces,
    layout: AttentionLayout,
    caches: LayerCaches,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Take rows through every layer, writing their keys and values on the way.

    hidden: contiguous [num_rows, width] of the stack's dtype, used up: what it holds afterwards is
    not said. places, layout: of these rows. caches: one pair a layer, of the stack's dtype or of
    float8_e4m3fn at scale 1, which the single ops serve. Returns the residual stream after the last
    layer, [num_rows, width]; no norm is applied to it. Which rows share the pass changes no row's
    bits on a CPU or where Triton serves, as with the ops that it is made of, whose bits it has.

    Raises KernelInputError on a wrong shape, dtype, device or range, BackendUnavailableError when
    `backend` is named and cannot serve.
    """
    _check(hidden, stack, places, layout, caches)
    dtype = caches.pairs[0][0].dtype
    if backend is None:
        native = stack.native if hidden.is_cpu and dtype != FLOAT8 else None
    elif choose_backend(hidden.device, backend, dtype, native_rows.DTYPE_CODES) == "native":
        native = stack.native
        if native is None:
            raise BackendUnavailableError("the native library does not run all of these layers")
    else:
        native = None
    if native is None:
        return reference_decoder.decoder_layers(hidden, stack, places, layout, caches.pairs)
    native_decoder.decoder_layers(hidden, native, places, layout, caches.pointers)
    return hidden


def _check(
    hidden: Tensor,
    stack: DecoderStack,
    places: RotaryPlaces,
    layout: AttentionLayout,
    caches: LayerCaches,
) -> None:
    num_rows = places.positions.shape[0]
    if hidden.shape != (num_rows, stack.width) or hidden.dtype != stack.dtype:
        raise KernelInputError(
            f"hidden must be {stack.dtype} [{num_rows}, {stack.width}], "
            f"got {hidden.dtype} {list(hidden.shape)}"
        )
    if not hidden.is_contiguous():
        raise KernelInputError("hidden must be contiguous")
    cache = caches.pairs[0][0]
    heads = (stack.num_kv_heads, stack.head_dim)
    if len(caches.pairs) != len(stack.layers) or cache.shape[2:] != heads:
        raise KernelInputError(
            f"the caches must be of {len(stack.layers)} layers and {heads}, "
            f"got {len(caches.pairs)} and {list(cache.shape[2:])}"
        )
    if 0 in cache.shape:
        raise KernelInputError("a cache of no block holds nothing")
    if places.cosines.shape[1] != stack.head_dim:
        raise KernelInputError(
            f"cosines are of {places.cosines.shape[1]} dimensions, heads of {stack.head_dim}"
        )
    if hidden.dtype != places.cosines.dtype:
        raise KernelInputError(f"dtypes differ: {hidden.dtype}, tables {places.cosines.dtype}")
    check_scales(hidden.dtype, cache.dtype, 1.0, 1.0)
    if layout.ancestors.shape[0] != num_rows:
        raise KernelInputError(f"ancestors are of {layout.ancestors.shape[0]} rows, not {num_rows}")
    devices = {t.device for t in (hidden, cache, places.positions, layout.ancestors)}
    if len(devices) > 1:
        raise KernelInputError("rows, places, layout and caches are on different devices")
