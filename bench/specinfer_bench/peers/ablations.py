"""What each idea brings: `python -m specinfer_bench.peers.ablations --help`.

Specinfer with one part taken out at a time, in one process and in turn: the tree, the noise that
drafter and target share, the packed weights, and drafting ahead put in (it is off where both share
a CPU). All arms draw the same tokens, which is compared. The commit beside the next propose is
measured by `specinfer_bench.overlap`, for it takes a store that answers over a network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch

from specinfer.messages import SpeculationOptions
from specinfer.sampling import SamplingParams
from specinfer_bench.local import LocalDraftLink, router_over, running
from specinfer_bench.peers.__main__ import bench_parser, run_comparison
from specinfer_bench.peers.ours import run_router
from specinfer_bench.peers.peer import Arm, Pair
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_draft.worker import Worker as DraftWorker
from specinfer_draft.worker import build_worker as build_drafter
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


@dataclass(frozen=True)
class Parts:
    """Workers of this process whose engines run.

    Attributes:
        verifier: with weights packed for our own product.
        others: with weights in other layouts, by layout.
        drafter: as a worker here is by default.
        ahead: that drafts ahead.
    """

    verifier: Worker
    others: Mapping[Layout, Worker]
    drafter: DraftWorker
    ahead: DraftWorker


class Ablations:
    """Specinfer in one process, less one thing at a time."""

    name = "specinfer"

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """All arms; raises InvalidCheckpoint."""
        with ExitStack() as stack, asyncio.Runner() as loop:
            parts = _start(pair, stack)
            full = router_over(parts.verifier, parts.drafter)
            own_law = router_over(
                parts.verifier,
                parts.drafter,
                OwnLawLink(parts.drafter.engine, parts.drafter.info),
            )
            ahead = router_over(parts.verifier, parts.ahead)
            others = {
                _LAYOUTS[layout]: router_over(worker, parts.drafter)
                for layout, worker in parts.others.items()
            }

            def arm(router: Router, options: SpeculationOptions | None = None) -> Arm:
                run = partial(run_router, loop, router, speculation=options)
                plain = options is not None and not options.enabled
                return Arm(run, plain=plain, seeded=True)

            off = SpeculationOptions(enabled=False)
            yield {
                PLAIN: arm(full, off),
                **{f"plain, {name}": arm(router, off) for name, router in others.items()},
                FULL: arm(full),
                **{f"no tree, chain of {length}": arm(full, _chain(length)) for length in _CHAINS},
                "no shared noise": arm(own_law),
                **{name: arm(router) for name, router in others.items()},
                "with drafting ahead": arm(ahead),
            }


def _chain(length: int) -> SpeculationOptions:
    return SpeculationOptions(max_nodes=length, max_depth=length, widths=(1,) * length)


def _start(pair: Pair, stack: ExitStack) -> Parts:
    verify = VerifySettings(model=pair.target, dtype=pair.dtype)
    draft = DraftSettings(model=pair.draft, dtype=pair.dtype)
    served = layouts(torch.empty(16, 16, dtype=getattr(torch, pair.dtype)))
    parts = Parts(
        build_verifier(verify),
        {layout: _laid_out(verify, layout) for layout in served[1:]},
        build_drafter(draft),
        build_drafter(replace(draft, ahead="on")),
    )
    for verifier in (parts.verifier, *parts.others.values()):
        stack.enter_context(running(verifier.engine))
    for drafter in (parts.drafter, parts.ahead):
        stack.enter_context(running(drafter.engine))
    return parts


def _laid_out(settings: VerifySettings, layout: Layout) -> Worker:
    """A verify worker whose weights have a layout that no setting offers."""
    with ExitStack() as stack:
        for name in _PACKERS:
            stack.enter_context(patch(name, partial(pack_linear, layout=layout)))
        # Its passes cost other times than those that are kept for this model.
        return build_verifier(replace(settings, profile="off"))


def main() -> None:
    """Run all arms, write the results and print the table."""
    run_comparison(MODULE, [Ablations()], bench_parser(MODULE, __doc__).parse_args(), PLAIN, FULL)


if __name__ == "__main__":
    main()
