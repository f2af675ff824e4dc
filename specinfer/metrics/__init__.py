"""What specinfer counts, for Prometheus. Needs the `serve` extra.

`catalogue` names every metric once; `router_metrics` and `worker_metrics` count by it; `exposition`
is what a scrape gets. This package knows nothing of how sessions or workers run.
"""

from specinfer.metrics.exposition import MetricsServer, expose, expose_aside
from specinfer.metrics.router_metrics import RouterMetrics
from specinfer.metrics.worker_metrics import DraftMetrics, VerifyMetrics, WorkerMetrics

__all__ = [
    "DraftMetrics",
    "MetricsServer",
    "RouterMetrics",
    "VerifyMetrics",
    "WorkerMetrics",
    "expose",
    "expose_aside",
]
