"""Tokens per second on one GPU: ours, plain and speculative, beside `transformers`.

    python -m specinfer_bench.gpu_peers --grow 7b --output bench/results/gpu-peers.json

The comparison of `specinfer_bench.peers`, with the engines that take a device: the router's loop
over a verify and a draft engine of this process, and `transformers` plain, assisted by the same
drafter, and with prompt lookup. This module knows nothing of how it is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from specinfer.errors import Unavailable
from specinfer.messages import SpeculationOptions
from specinfer_bench.gpu import require_cuda
from specinfer_bench.local import router_over, running
from specinfer_bench.peers.__main__ import bench_parser, run_comparison
from specinfer_bench.peers.hugging_face import Transformers
from specinfer_bench.peers.ours import PLAIN, SPECULATIVE, run_router
from specinfer_bench.peers.peer import Arm, Pair, Peer
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_draft.worker import build_worker as build_drafter
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import build_worker as build_verifier

MODULE = "specinfer_bench.gpu_peers"
# MiB; the prompts need a small part of it.
_KV_MEMORY = 2048


class OneDevice:
    """Our engines and the router's loop in this process, both models on one device."""

    name = "specinfer"

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """The arms PLAIN and SPECULATIVE; raises InvalidCheckpoint."""
        verify = VerifySettings(
            model=pair.target, dtype=pair.dtype, device=pair.device, kv_memory=_KV_MEMORY
        )
        draft = DraftSettings(model=pair.draft, dtype=pair.dtype, device=pair.device)
        verifier, drafter = build_verifier(verify), build_drafter(draft)
        with ExitStack() as stack, asyncio.Runner() as loop:
            stack.enter_context(running(verifier.engine))
            stack.enter_context(running(drafter.engine))
            run = partial(run_router, loop, router_over(verifier, drafter))
            off = SpeculationOptions(enabled=False)
            yield {
                PLAIN: Arm(partial(run, speculation=off), plain=True, seeded=True),
                SPECULATIVE: Arm(run, seeded=True),
            }


PEERS: tuple[Peer, ...] = (OneDevice(), Transformers())


def gpu_peers_parser() -> argparse.ArgumentParser:
    """Arguments of this comparison."""
    parser = bench_parser(MODULE, __doc__)
    parser.add_argument("--device", default="cuda:0", help="of all models")
    return parser


def main() -> int:
    """Compare, write the results and print the table; 2 where the device is not there."""
    arguments = gpu_peers_parser().parse_args()
    try:
        if arguments.device != "cpu":
            require_cuda()
    except Unavailable as error:
        print(f"Unavailable: {error.message}", file=sys.stderr)
        return 2
    run_comparison(MODULE, PEERS, arguments, PLAIN, SPECULATIVE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
