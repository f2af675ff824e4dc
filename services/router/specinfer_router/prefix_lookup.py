"""Which verify workers hold the beginning of a prompt, asked within milliseconds or not at all.

This module knows nothing of links, loads or what is made of the answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from specinfer.errors import SpecinferError
from specinfer.messages import WorkerInfo
from specinfer.prefixes import PrefixDirectory, hash_chain, hash_key

log = logging.getLogger(__name__)

MAX_ASKED_WORKERS = 64
# After an answer that did not come in time nobody waits for the next one so soon.
REST_SECONDS = 1.0


class PrefixLookup:
    """Asks a directory; an answer that is late or none is as if nothing were held."""

    def __init__(
        self,
        directory: PrefixDirectory,
        *,
        budget_seconds: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take down whom to ask and how long to wait for an answer."""
        self._directory = directory
        self._budget_seconds = budget_seconds
        self._clock = clock
        self._rest_until = 0.0

    async def held(
        self, infos: Sequence[WorkerInfo], token_ids: Sequence[int]
    ) -> Mapping[str, int]:
        """Blocks of the beginning of `token_ids` that workers hold, by worker id; only if any.

        Workers whose blocks have another size than the first one's are not asked about.
        """
        if not infos or len(token_ids) < infos[0].block_size or self._clock() < self._rest_until:
            return {}
        size, model_hash = infos[0].block_size, infos[0].model_hash
        worker_ids = [info.worker_id for info in infos if info.block_size == size]
        worker_ids = worker_ids[:MAX_ASKED_WORKERS]
        chain = hash_chain(token_ids, size, hash_key(model_hash))
        try:
            async with asyncio.timeout(self._budget_seconds):
                found = await self._directory.find(worker_ids, chain)
        except (SpecinferError, TimeoutError) as error:
            log.debug("who holds a prefix is not known: %s", error)
            self._rest_until = self._clock() + REST_SECONDS
            return {}
        named = zip(worker_ids, found, strict=True)
        return {worker_id: held.num_blocks for worker_id, held in named if held.num_blocks}
