"""Operations that wait for their device are refused, the others run. A CPU stands in for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specinfer_engine.device_waits import RefuseWaits, WaitsForDevice

VALUES = torch.arange(16.0).view(4, 4)
ROWS = torch.tensor([1, 2])
ELSEWHERE = torch.empty(4, device="meta")

WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: VALUES.sum().item(),
    "truth": lambda: bool(VALUES.sum() > 0),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "nonzero": lambda: VALUES.nonzero(),
    "mask": lambda: VALUES[VALUES > 3],
    "written mask": lambda: VALUES.clone().index_put_((VALUES > 3,), VALUES[VALUES > 3]),
    "one_hot": lambda: functional.one_hot(ROWS),
    "bincount": lambda: torch.bincount(ROWS),
    "from the host": lambda: torch.tensor([1.0]),
    "to the host": lambda: VALUES.to("meta"),
    "copied to the host": lambda: ELSEWHERE.copy_(VALUES[0]),
}


def pass_without_waits() -> Tensor:
    """What models do: products, norms, softmax, rows by their numbers, other formats."""
    rows = functional.embedding(ROWS, VALUES).index_select(0, torch.arange(2))
    rows = functional.linear(rows, VALUES)[torch.arange(2)].to(torch.float64).float()
    rows = rows.clone().index_put_((rows > 3,), torch.zeros(()))
    rows = functional.scaled_dot_product_attention(rows[None], rows[None], rows[None])
    return rows.softmax(-1).topk(2)[0]


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused(name: str) -> None:
    with torch.inference_mode(), pytest.raises(WaitsForDevice), RefuseWaits("cpu"):
        WAITING[name]()


def test_what_does_not_wait_runs() -> None:
    with torch.inference_mode():
        expected = pass_without_waits()
        with RefuseWaits("cpu"):
            found = pass_without_waits()
    assert torch.equal(found, expected)


def test_the_host_may_be_asked_about_its_own_tensors() -> None:
    with RefuseWaits("cuda"):
        assert VALUES.sum().item() == 120.0
