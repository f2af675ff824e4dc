"""A session's places in both tiers: `draft_seat.py` and `verify_seat.py` say what each can lose.

This module knows nothing of either; it names what the session's loop uses of them.
"""

from specinfer_router.draft_seat import DraftSeat
from specinfer_router.guess import Guess, usable_tree
from specinfer_router.verify_seat import Checked, VerifySeat, check_result

__all__ = ["Checked", "DraftSeat", "Guess", "VerifySeat", "check_result", "usable_tree"]
