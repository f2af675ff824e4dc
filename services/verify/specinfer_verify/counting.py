"""What a verify worker tells Prometheus of its passes and its pool.

A pass is counted once, session by session and never token by token; the rest is read when somebody
asks. This module knows nothing of futures, models or gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specinfer.metrics import VerifyMetrics
from specinfer_engine.blocks import BlockManager
from specinfer_engine.fence import OwnerFence
from specinfer_verify.scheduler import ScheduledRows, Scheduler
from specinfer_verify.walks import PassFacts

CountPass = Callable[[Sequence[ScheduledRows], PassFacts], None]


def count_nothing(plan: Sequence[ScheduledRows], facts: PassFacts) -> None:
    """Where nobody looks at the numbers."""


def count_in(
    metrics: VerifyMetrics, scheduler: Scheduler, blocks: BlockManager, fence: OwnerFence
) -> CountPass:
    """Show what these hold at each scrape; returns what counts a pass."""
    metrics.watch_one("num_sessions", lambda: len(scheduler.sessions))
    metrics.watch_one("num_steps_waiting", lambda: scheduler.num_waiting)
    metrics.watch_one("num_preemptions", lambda: scheduler.num_preemptions)
    metrics.watch_one("fenced_calls", lambda: fence.num_refused)
    metrics.watch_pool(blocks)

    def count(plan: Sequence[ScheduledRows], facts: PassFacts) -> None:
        metrics.observe_pass(
            facts.end - facts.start,
            num_sessions=len(plan),
            num_prefill=sum(item.num_chunk for item in plan),
            num_roots=sum(item.tree is not None for item in plan),
            num_rows=facts.num_rows,
        )

    return count
