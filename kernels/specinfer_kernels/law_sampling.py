"""A token from raw logits in one go: temperature, top-k, top-p and min-p, then the seeded draw.

What `sample_gumbel` does after the caller has processed the logits, this does from the raw ones and
without sorting the vocabulary. Every row has its own law. Knows no request, penalty or grammar:
rows that need one are processed by the caller and come with a law of temperature 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specinfer_kernels import reference_law
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError


@dataclass(frozen=True)
class Laws:
    """How each row is turned into a law; all [n], on the device of the logits.

    temperature: float32; 0 takes the most probable token, and nothing below applies.
    top_k: int32, tokens kept, of equal ones the lower ids; 0 keeps all.
    top_p: float64, mass kept of what top_k left, one token at least; 1 keeps all.
    min_p: float64, least probability kept as a share of the best one's; 0 keeps all.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def __post_init__(self) -> None:
        expected = (
            ("temperature", torch.float32),
            ("top_k", torch.int32),
            ("top_p", torch.float64),
            ("min_p", torch.float64),
        )
        for name, dtype in expected:
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
                raise KernelInputError(
                    f"{name} must be a flat {dtype}, got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.shape != self.temperature.shape or tensor.device != self.temperature.device:
                raise KernelInputError("the tensors of laws differ in length or device")


def sample_law(
    logits: Tensor,
    laws: Laws,
    seeds: Tensor,
    positions: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """argmax_v(logit_v / temperature + noise_v) over the tokens a row's law keeps: int64 [n].

    logits: raw float32 [n, vocab_size], last dimension contiguous, -inf allowed; a NaN is never
    kept. seeds, positions: int64 [n]; the noise is that of `sample_gumbel`. Masses are summed in
    float64 in an order that depends on the vocabulary's size alone, so a row's token does not
    depend on other rows. The lowest index wins ties; a row with nothing above -inf gives 0.
    Raises KernelInputError on a wrong shape or dtype, BackendUnavailableError when `backend` is
    named and cannot serve.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] < 1:
        raise KernelInputError(
            f"logits must be float32 [n, vocab_size], got {logits.dtype} {list(logits.shape)}"
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise KernelInputError("the last dimension of logits must be contiguous")
    rows = logits.shape[:1]
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        if tensor.dtype != torch.int64 or tensor.shape != rows or not tensor.is_contiguous():
            raise KernelInputError(f"{name} must be a flat int64 of {rows[0]} rows")
    if laws.temperature.shape != rows:
        raise KernelInputError(f"{rows[0]} rows of logits, {laws.temperature.shape[0]} laws")
    devices = {tensor.device for tensor in (logits, laws.temperature, seeds, positions)}
    if len(devices) > 1:
        raise KernelInputError("logits, laws, seeds and positions are on different devices")
    # There is no C++ kernel: on a CPU the engine draws for visited nodes only.
    chosen = choose_backend(logits.device, backend, logits.dtype, triton_dtypes=(torch.float32,))
    if chosen == "triton":
        from specinfer_kernels.triton import sampling

        return sampling.sample_law(logits, laws, seeds, positions)
    return reference_law.sample_law(
        logits, laws.temperature, laws.top_k, laws.top_p, laws.min_p, seeds, positions
    )
