"""The tree shapes under which tokens are compared with plain decoding.

This module knows nothing of prompts or settings.
"""

from __future__ import annotations

from specinfer.messages import SpeculationOptions

SHAPES: dict[str, SpeculationOptions] = {
    "the cluster's": SpeculationOptions(),
    "chain of 6": SpeculationOptions(max_nodes=6, max_depth=6, widths=(1,) * 6),
    "widths 3,2,2,1": SpeculationOptions(max_nodes=33, max_depth=4, widths=(3, 2, 2, 1)),
}
