"""Which owner of a session a worker listens to: the highest that it has heard of.

An owner number says how often a session was claimed. A router that lost a session does not always
know it yet; what it still sends is refused here, so that it cannot disturb the one who has it now.
Only a bounded number of sessions is remembered beyond their end, the latest heard of. This module
knows nothing of rounds, models or gRPC.
"""

from __future__ import annotations

from collections import OrderedDict

from specinfer.errors import LeaseLost

MAX_REMEMBERED = 65_536
# No session has a longer name, so a longer one is not worth remembering.
MAX_SESSION_ID_LENGTH = 256


class OwnerFence:
    """The highest owner of each session, for those that were claimed at all.

    Attributes:
        num_refused: items of former owners so far.

    Args:
        max_remembered: most sessions remembered; the one not heard of for longest goes first.
    """

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self.num_refused = 0
        self._max_remembered = max_remembered
        self._owners: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def pass_through(self, session_id: str, owner: int, holder: int | None) -> bool:
        """Let an item of `owner` through; whether a former owner's session ends with that.

        Args:
            session_id: the session.
            owner: who sent the item.
            holder: who has the session here, or None when it is not open.

        Raises:
            LeaseLost: somebody has claimed the session since.
        """
        highest = max(self._owners.get(session_id, 0), holder or 0)
        if owner < highest:
            self.num_refused += 1
            raise LeaseLost(
                f"session {session_id} belongs to owner {highest} now, not to {owner}; let go of it"
            )
        # The first owner can displace nobody, and most sessions never have another.
        if owner > 0 and len(session_id) <= MAX_SESSION_ID_LENGTH:
            self._owners[session_id] = owner
            self._owners.move_to_end(session_id)
            if len(self._owners) > self._max_remembered:
                self._owners.popitem(last=False)
        return holder is not None and holder < owner
