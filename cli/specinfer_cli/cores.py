"""Which cores the tiers of a cluster on this machine get. Knows numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

# A drafter's core may cost the verify workers at most this part of the machine.
_DRAFT_SHARE = 4


@dataclass(frozen=True)
class CoreShares:
    """Cores and threads of every worker.

    Attributes:
        verify, draft: cores of each worker, empty where all run on all cores.
        verify_threads, draft_threads: compute threads of each.
    """

    verify: tuple[tuple[int, ...], ...]
    draft: tuple[tuple[int, ...], ...]
    verify_threads: int
    draft_threads: int

    @property
    def apart(self) -> bool:
        """Whether no two workers share a core."""
        return bool(self.verify[0])

    @property
    def num_threads(self) -> int:
        """Compute threads of all workers together."""
        return len(self.verify) * self.verify_threads + len(self.draft) * self.draft_threads


def share_cores(
    cores: tuple[int, ...], num_verifiers: int, num_drafters: int, num_threads: int | None = None
) -> CoreShares:
    """Give each worker cores of its own where they come to all of them; else all share all.

    A drafter gets one core, since drafters are small, and the verify workers the rest. On few cores
    they share: a round drafts and verifies in turn, and a core that only drafts would be missed.

    Workers are bound only where together they take every core. Where the user's threads need fewer,
    the system finds idle ones; bound, a second cluster would meet the first one on the same.

    Args:
        cores: that there are.
        num_verifiers, num_drafters: workers, at least one verifier.
        num_threads: of each worker, where the user has said it.
    """
    count, for_drafts = len(cores), num_drafters * (num_threads or 1)
    each = num_threads or (count - for_drafts) // num_verifiers
    if num_threads is None:
        apart = each >= 1 and for_drafts * _DRAFT_SHARE <= count
    else:
        apart = each * num_verifiers + for_drafts == count
    if not apart:
        shared: tuple[int, ...] = ()
        threads = num_threads or max(1, count // num_verifiers)
        workers = (shared,) * num_verifiers, (shared,) * num_drafters
        return CoreShares(*workers, threads, num_threads or 1)
    # From the front for the verify workers: theirs are neighbours, often of one node of memory.
    sizes = [each] * num_verifiers + [num_threads or 1] * num_drafters
    sizes[-1] += count - sum(sizes)  # what does not go into equal shares
    ends = accumulate(sizes)
    given = tuple(cores[end - size : end] for size, end in zip(sizes, ends, strict=True))
    return CoreShares(given[:num_verifiers], given[num_verifiers:], each, num_threads or 1)
