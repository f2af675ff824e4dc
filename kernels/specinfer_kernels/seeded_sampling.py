"""Seeded sampling by Gumbel noise from an integer counter hash.

The noise of a token is a function of (seed, position, purpose, token) made by integer arithmetic
and separate IEEE operations, so it has the same bits on every device and in every batch; the
token chosen is argmax_v(logit_v + noise_v), a draw from softmax(logits). Knows no request, no
temperature and no tree: logits arrive processed.
"""

from enum import IntEnum

import torch
from torch import Tensor

from specinfer_kernels import native, reference
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError


class Purpose(IntEnum):
    """What a random word is for. Two tests never share one."""

    TARGET = 1
    ACCEPT = 2
    RESIDUAL = 3
    DRAFT = 4
    ORDER = 5


TARGET = Purpose.TARGET
ACCEPT = Purpose.ACCEPT
RESIDUAL = Purpose.RESIDUAL
DRAFT = Purpose.DRAFT
ORDER = Purpose.ORDER


def counter_hash(seed: Tensor, position: Tensor, purpose: int, vocab_size: int) -> Tensor:
    """One 64-bit word for each (seed, position, purpose, token): int64 [n, vocab_size].

    seed, position: int64 [n]. The words of a row are the splitmix64 stream (Steele, Lea and Flood,
    OOPSLA 2014) of a state mixed from seed, purpose and position, so a word can be recomputed
    alone. Raises KernelInputError on a wrong shape or dtype.
    """
    _check_counters(seed, position, vocab_size)
    return reference.counter_hash(seed, position, int(purpose), vocab_size)


def gumbel_noise(
    seeds: Tensor, positions: Tensor, vocab_size: int, *, backend: Backend | None = None
) -> Tensor:
    """Standard Gumbel noise for purpose TARGET: float64 [n, vocab_size].

    seeds, positions: int64 [n]. Made from the top 53 bits of the counter hash, the lowest of them
    set, so it is finite; the same bits on every device.
    """
    _check_counters(seeds, positions, vocab_size)
    if choose_backend(seeds.device, backend) == "native":
        return native.gumbel_noise(seeds.contiguous(), positions.contiguous(), vocab_size)
    return reference.gumbel_noise(seeds, positions, vocab_size, TARGET)


def sample_gumbel(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    greedy: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """argmax_v(logits_v + noise_v) of every row in float64: int64 [n].

    logits: processed float32 or float64 [n, vocab_size], -inf allowed; a NaN never wins. seeds,
    positions: int64 [n]; greedy: bool [n], rows without noise. The lowest index wins ties; a row
    with nothing above -inf gives 0. Raises KernelInputError on a wrong shape or dtype,
    BackendUnavailableError when `backend` is named and cannot serve.
    """
    if logits.dim() != 2:
        raise KernelInputError(f"logits must be [n, vocab_size], got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise KernelInputError(f"logits must be float32 or float64, got {logits.dtype}")
    _check_counters(seeds, positions, logits.shape[1])
    rows = logits.shape[:1]
    if seeds.shape != rows or greedy.shape != rows or greedy.dtype != torch.bool:
        raise KernelInputError(
            f"{rows[0]} rows of logits need as many seeds, positions and bool greedy, got "
            f"{list(seeds.shape)} and {greedy.dtype} {list(greedy.shape)}"
        )
    if not logits.device == seeds.device == greedy.device:
        raise KernelInputError("logits, seeds and greedy are on different devices")
    if choose_backend(logits.device, backend) == "native":
        rows_contiguous = logits if logits.stride(1) == 1 else logits.contiguous()
        return native.sample_gumbel(
            rows_contiguous, seeds.contiguous(), positions.contiguous(), greedy.contiguous()
        )
    noise = reference.gumbel_noise(seeds, positions, logits.shape[1], TARGET)
    return reference.sample_gumbel(logits, noise, greedy)


def draw_row(
    law: Tensor, seed: int, position: int, *, greedy: bool, backend: Backend | None = None
) -> int | None:
    """The token that one row decides, as `sample_gumbel` has it; None where the row has a NaN.

    For a walk, which looks at a node only when it has come there: law is contiguous float32 or
    float64 [vocab_size], seed and position are plain numbers of 64 bits, sign included. Raises
    KernelInputError on a wrong shape, dtype or number, BackendUnavailableError when `backend` is
    named and cannot serve.
    """
    if law.dim() != 1 or law.shape[0] < 1 or not law.is_contiguous():
        raise KernelInputError(f"law must be contiguous [vocab_size], got {list(law.shape)}")
    if law.dtype not in (torch.float32, torch.float64):
        raise KernelInputError(f"law must be float32 or float64, got {law.dtype}")
    if not all(-(1 << 63) <= number < 1 << 63 for number in (seed, position)):
        raise KernelInputError(f"{seed} or {position} takes more than 64 bits")
    if choose_backend(law.device, backend) == "native":
        return native.draw_row(law, seed, position, greedy)
    if greedy:
        return reference.draw_row(law, None)
    seeds = torch.tensor([seed], device=law.device)
    positions = torch.tensor([position], device=law.device)
    noise = reference.gumbel_noise(seeds, positions, law.shape[0], TARGET)
    return reference.draw_row(law, noise[0])


def _check_counters(seed: Tensor, position: Tensor, vocab_size: int) -> None:
    if seed.dtype != torch.int64 or position.dtype != torch.int64 or seed.dim() != 1:
        raise KernelInputError(
            f"seed and position must be flat int64, got {seed.dtype} and {position.dtype}"
        )
    if seed.shape != position.shape:
        raise KernelInputError(f"{seed.shape[0]} seeds but {position.shape[0]} positions")
    if seed.device != position.device:
        raise KernelInputError("seeds and positions are on different devices")
    if vocab_size < 1:
        raise KernelInputError(f"vocab_size must be at least 1, got {vocab_size}")
