"""What each idea brings: `python -m specinfer_bench.peers.ablations --help`.

Specinfer with one part taken out at a time, without a network and in turn: the tree, the noise that
drafter and target share, the packed weights, and drafting ahead put in (it is off where both share
a CPU). Each layout of weights has a process of its own, so that no pass finds threads of another
verifier. All arms draw the same tokens, which is compared. The commit beside the next propose is
measured by `specinfer_bench.overlap`, for it takes a store that answers over a network.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from specinfer.messages import SpeculationOptions
from specinfer.sampling import SamplingParams
from specinfer_bench.local import LocalDraftLink, built, built_drafter, router_over, running
from specinfer_bench.peers.__main__ import bench_parser, run_comparison
from specinfer_bench.peers.apart import Apart
from specinfer_bench.peers.ours import run_router
from specinfer_bench.peers.peer import Arm, Pair
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_kernels import pack_linear
from specinfer_kernels.packed_linear import Layout, layouts
from specinfer_router.answer import Answer
from specinfer_router.router import Router
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import Worker
from specinfer_verify.worker import build_worker as build_verifier

MODULE = "specinfer_bench.peers.ablations"
PLAIN, FULL = "plain", "full"
_LAYOUTS: Mapping[Layout, str] = {"onednn": "oneDNN's packing", "plain": "no packing"}
_CHAINS = (8, 16)
_MOST_ROWS = 16
# The modules that lay weights out at load, by the names they call.
_PACKERS = ("specinfer_engine.fused.pack_linear", "specinfer_engine.linear.pack_linear")


class OwnLawLink(LocalDraftLink):
    """A drafter that does not know the noise the target draws with: it ranks by its own logits."""

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int,
        grammar: None = None,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[None]:
        """Open the session as if it were greedy: noise has the weight 0 there."""
        own = replace(sampling, temperature=0.0)
        return super().open(session_id, epoch, token_ids, own, num_prompt_tokens)


class Ablations:
    """Specinfer without a network, and less one thing at a time."""

    name = "specinfer"

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """All arms but those of other layouts; raises InvalidCheckpoint."""
        draft = DraftSettings(model=pair.draft, dtype=pair.dtype)
        verifier = built(build_verifier, VerifySettings(model=pair.target, dtype=pair.dtype))
        drafter, ahead = built_drafter(draft), built_drafter(replace(draft, ahead="on"))
        with (
            running(drafter.engine),
            running(ahead.engine),
            running(verifier.engine),
            asyncio.Runner() as loop,
        ):
            full = router_over(verifier, drafter)
            own_law = OwnLawLink(drafter.engine, drafter.info)
            yield {
                PLAIN: _arm(loop, full, SpeculationOptions(enabled=False)),
                FULL: _arm(loop, full),
                **{
                    f"no tree, chain of {length}": _arm(loop, full, _chain(length))
                    for length in _CHAINS
                },
                "no shared noise": _arm(loop, router_over(verifier, drafter, own_law)),
                "with drafting ahead": _arm(loop, router_over(verifier, ahead)),
            }


class OneLayout:
    """Specinfer without a network, its target's weights in one layout and in passes of few rows.

    Args:
        layout: one that no setting offers, or None for the usual one, which others are compared
            with.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.name = _LAYOUTS[layout] if layout else "specinfer"
        self._arms = (f"plain, {self.name}", self.name) if layout else (PLAIN, FULL)
        self._layout: Layout | None = layout

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Without guesses and with them; raises InvalidCheckpoint."""
        verifier = built(self._build, VerifySettings(model=pair.target, dtype=pair.dtype))
        drafter = built_drafter(DraftSettings(model=pair.draft, dtype=pair.dtype))
        plain, full = self._arms
        with running(drafter.engine), running(verifier.engine), asyncio.Runner() as loop:
            router = router_over(verifier, drafter)
            yield {
                plain: _arm(loop, router, SpeculationOptions(enabled=False)),
                full: _arm(loop, router),
            }

    def _build(self, settings: VerifySettings) -> Worker:
        # Passes with many rows take too long to be measured without packing.
        few = replace(settings, max_rows=_MOST_ROWS, max_tree_nodes=_MOST_ROWS, min_prefill_rows=1)
        with ExitStack() as stack:
            for name in _PACKERS if self._layout else ():
                stack.enter_context(patch(name, partial(pack_linear, layout=self._layout)))
            # What is kept for this model are costs of its usual layout.
            return build_verifier(replace(few, profile="off"))


def _arm(loop: asyncio.Runner, router: Router, options: SpeculationOptions | None = None) -> Arm:
    plain = options is not None and not options.enabled
    return Arm(partial(run_router, loop, router, speculation=options), plain=plain, seeded=True)


def _chain(length: int) -> SpeculationOptions:
    return SpeculationOptions(max_nodes=length, max_depth=length, widths=(1,) * length)


def other_layouts(dtype: str) -> tuple[Layout, ...]:
    """Layouts that weights of a number format could have here and by default have not."""
    return layouts(torch.empty(16, 16, dtype=getattr(torch, dtype)))[1:]


def ablations_parser() -> argparse.ArgumentParser:
    """Arguments of this comparison."""
    parser = bench_parser(MODULE, __doc__)
    add, kinds = parser.add_argument, tuple(_LAYOUTS)
    add("--layouts", nargs="*", choices=kinds, default=kinds, help="other layouts of weights")
    add("--ideas", action=argparse.BooleanOptionalAction, default=True, help="all but layouts")
    return parser


def main() -> None:
    """Run all arms, write the results and print the table."""
    arguments = ablations_parser().parse_args()
    others = [
        Apart(OneLayout, layout)
        for layout in other_layouts(arguments.dtype)
        if layout in arguments.layouts
    ]
    first = Apart(Ablations) if arguments.ideas else Apart(OneLayout)
    run_comparison(MODULE, [first, *others], arguments, PLAIN, FULL)


if __name__ == "__main__":
    main()
