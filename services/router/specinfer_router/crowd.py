"""How many sessions are a crowd: one number for all who treat a crowd otherwise than a few.

It knows nothing of what they do with it.
"""

from __future__ import annotations

# More sessions than this at one worker are decided for as one, and hardly wait for each other.
CROWD = 8
