"""Between our plain data and the wire, both ways; the only place that knows both forms.

Everything that comes off the wire is treated as hostile: the dataclasses validate themselves, and
the functions here turn absent fields into their documented defaults. They know nothing of channels,
sessions or tensors.
"""

from specinfer.convert.admin import (
    cluster_from_wire,
    cluster_to_wire,
    finding_from_wire,
    finding_to_wire,
    session_status_from_wire,
    session_status_to_wire,
)
from specinfer.convert.generation import (
    capabilities_from_wire,
    capabilities_to_wire,
    event_from_wire,
    event_to_wire,
    fill_event,
    report_from_wire,
    report_to_wire,
)
from specinfer.convert.requests import (
    request_from_wire,
    request_to_wire,
    resume_from_wire,
    resume_to_wire,
)
from specinfer.convert.shared import (
    fill_tree,
    grammar_from_wire,
    grammar_to_wire,
    logprob_from_wire,
    logprob_to_wire,
    sampling_from_wire,
    sampling_to_wire,
    status_error,
    status_to_wire,
    tree_from_wire,
    tree_to_wire,
)
from specinfer.convert.workers import (
    draft_result_from_wire,
    draft_result_to_wire,
    fill_shape,
    load_from_wire,
    load_to_wire,
    shape_from_wire,
    shape_to_wire,
    verify_result_from_wire,
    verify_result_to_wire,
    worker_info_from_wire,
    worker_info_to_wire,
)

__all__ = [
    "capabilities_from_wire",
    "capabilities_to_wire",
    "cluster_from_wire",
    "cluster_to_wire",
    "draft_result_from_wire",
    "draft_result_to_wire",
    "event_from_wire",
    "event_to_wire",
    "fill_event",
    "fill_shape",
    "fill_tree",
    "finding_from_wire",
    "finding_to_wire",
    "grammar_from_wire",
    "grammar_to_wire",
    "load_from_wire",
    "load_to_wire",
    "logprob_from_wire",
    "logprob_to_wire",
    "report_from_wire",
    "report_to_wire",
    "request_from_wire",
    "request_to_wire",
    "resume_from_wire",
    "resume_to_wire",
    "sampling_from_wire",
    "sampling_to_wire",
    "session_status_from_wire",
    "session_status_to_wire",
    "shape_from_wire",
    "shape_to_wire",
    "status_error",
    "status_to_wire",
    "tree_from_wire",
    "tree_to_wire",
    "verify_result_from_wire",
    "verify_result_to_wire",
    "worker_info_from_wire",
    "worker_info_to_wire",
]
