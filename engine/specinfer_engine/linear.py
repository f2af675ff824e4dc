"""Puts row-invariant matrix products under a `transformers` model, in place.

Three shapes of product occur in decoders: linear modules (`nn.Linear` and GPT-2's `Conv1D`), bare
matrices handed to `functional.linear` (the routers of mixtures of experts), and stacks of expert
matrices. Each is packed once at load and its original freed. int8 weights are for the first and the
last: a router's matrix is small, and rounding it would send tokens elsewhere. Knows no architecture
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from specinfer_kernels import PackedLinear, pack_linear, round_to_int8

EXPERTS_IMPLEMENTATION = "specinfer"
_PACKED_EXPERTS = "packed_experts"


def round_weights(model: PreTrainedModel) -> None:
    """Turn a stock model into the one that int8 weights make of it, still in its own dtype.

    Packing it with int8 rounds to the same int8 once more. Embeddings and norms stay; a head that
    shares the embedding's matrix gets one of its own.
    """
    with torch.no_grad():
        for module in model.modules():
            if _is_linear(module):
                module.weight = _frozen(round_to_int8(module.weight))
            elif isinstance(module, Conv1D):
                module.weight = _frozen(round_to_int8(module.weight.t()).t().contiguous())
            elif _is_expert_stack(module):
                for name in (_first_of_experts(module), "down_proj"):
                    for matrix in getattr(module, name):
                        rows = matrix.t() if module.is_transposed else matrix
                        rows.copy_(round_to_int8(rows))


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def make_row_invariant(model: PreTrainedModel, int8: bool = False) -> None:
    """Replace every matrix product of the model that can be replaced; what remains a probe finds.

    int8: keep the weights that `round_weights` rounds as int8. A packed matrix that an embedding
    shares is held twice: a lookup cannot read packed rows.
    """
    with torch.no_grad():
        pack = partial(pack_linear, int8=int8)
        _replace_linears(model, pack)
        for module in model.modules():
            if _is_expert_stack(module):
                _pack_experts(module, pack)
            elif not isinstance(module, nn.Embedding):
                _wrap_matrices(module)


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _replace_linears(parent: nn.Module, pack: Callable[..., PackedLinear]) -> None:
    for name, child in list(parent.named_children()):
        if _is_linear(child):
            setattr(parent, name, pack(child.weight, child.bias))
        elif isinstance(child, Conv1D):
            setattr(parent, name, pack(child.weight.t().contiguous(), child.bias))
        else:
            _replace_linears(child, pack)


class PackedMatrix(Tensor):
    """A weight that answers `functional.linear` with its packed form and is a tensor otherwise."""

    packed: PackedLinear

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take over products without a bias; every other function sees a plain tensor."""
        given = dict(kwargs or {})
        if func is functional.linear and len(args) == 2 and not given:
            weight = args[1]
            if isinstance(weight, PackedMatrix) and not isinstance(args[0], PackedMatrix):
                return weight.packed(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)


def _wrap_matrices(module: nn.Module) -> None:
    """Let bare two-dimensional weights of a module multiply row-invariantly."""
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.dim() != 2 or not weight.is_floating_point():
            continue
        matrix = weight.detach().as_subclass(PackedMatrix)
        matrix.packed = pack_linear(weight.detach())
        delattr(module, name)
        # A plain attribute: as a parameter it would lose its class on the way.
        setattr(module, name, matrix)


def _is_expert_stack(module: nn.Module) -> bool:
    """Whether the module runs through `transformers`' interface for experts, in a known form."""
    down = getattr(module, "down_proj", None)
    return (
        hasattr(module, "is_transposed")
        and isinstance(down, nn.Parameter)
        and down.dim() == 3
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
    )


def _first_of_experts(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _pack_experts(module: Any, pack: Callable[..., PackedLinear]) -> None:
    stacks = []
    for name in (_first_of_experts(module), "down_proj"):
        weights = getattr(module, name)
        biases = getattr(module, f"{name}_bias") if module.has_bias else None
        stacks.append(
            [
                pack(
                    (weight.t() if module.is_transposed else weight).clone(),
                    None if biases is None else biases[index],
                )
                for index, weight in enumerate(weights.detach())
            ]
        )
        delattr(module, name)
    # A plain attribute, a tuple of (first, second) products for each expert.
    setattr(module, _PACKED_EXPERTS, tuple(zip(*stacks, strict=True)))
    module.config._experts_implementation = EXPERTS_IMPLEMENTATION


def packed_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Each row through its own experts, summed in the order in which the router ranks them.

    hidden_states: [num_rows, hidden_size]; top_k_index, top_k_weights: [num_rows, top_k].
    """
    num_rows, top_k = top_k_index.shape
    experts = cast("tuple[tuple[PackedLinear, PackedLinear], ...]", module.packed_experts)
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    outputs = hidden_states.new_empty(num_rows * top_k, hidden_states.shape[-1])
    start = 0
    for (first, second), count in zip(experts, counts, strict=True):
        if count == 0:
            continue
        pairs = order[start : start + count]
        inner = first(hidden_states[pairs // top_k])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outputs[pairs] = second(inner)
        start += count
    weighted = outputs.view(num_rows, top_k, -1) * top_k_weights.unsqueeze(-1)
    total = weighted[:, 0]
    for rank in range(1, top_k):
        total = total + weighted[:, rank]
    return total.to(hidden_states.dtype)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, packed_experts)
