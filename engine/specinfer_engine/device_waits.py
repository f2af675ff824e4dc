"""Notices what makes a thread wait for its device, which no recording can hold. Knows no model.

Asked for in the midst of a recording it would do harm: torch counts such a recording as under way
ever after, and gives no memory back to the device. So a pass is run under this check before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_WRITES_AT = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class WaitsForDevice(Exception):
    """An operation on tensors of the device waits for it, with its name."""


class RefuseWaits(TorchDispatchMode):
    """While it is entered, operations of this thread that wait for a device raise WaitsForDevice.

    Torch's own mode for it (`set_sync_debug_mode`) would fail the other threads of the process.

    Args:
        device_type: of the device.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or what it is made of, unless it waits."""
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        leaves = tree_leaves((args, kwargs))
        if any(self._is_there(leaf) for leaf in leaves) and _asks(func, args):
            raise WaitsForDevice(str(func))
        result = func(*args, **kwargs)
        if func in _COPIES and self._between_devices((*args[:2], result)):
            raise WaitsForDevice(str(func))
        return result

    def _between_devices(self, values: Sequence[object]) -> bool:
        return len({self._is_there(one) for one in values if isinstance(one, Tensor)}) > 1

    def _is_there(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device_type


def _asks(func: Any, args: Sequence[Any]) -> bool:
    """Whether the host has to know numbers of the device before it can go on."""
    if func is torch.ops.aten.lift_fresh.default:  # made of numbers of the host just now
        return True
    if func is torch.ops.aten.index.Tensor:
        return _has_mask(args[1])
    if func in _WRITES_AT:  # one value at a mask needs no list of its places
        return _has_mask(args[1]) and args[2].numel() != 1
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
