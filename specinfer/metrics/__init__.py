"""What specinfer counts, for Prometheus. Needs the `serve` extra.

`catalogue` names every metric once. This package knows nothing of how sessions or workers run.
"""

from specinfer.metrics.router_metrics import RouterMetrics

__all__ = ["RouterMetrics"]
