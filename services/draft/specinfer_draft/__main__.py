"""Starts a draft worker: settings, model, engine, server. Wiring only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from specinfer.metrics import DraftMetrics
from specinfer.telemetry import Telemetry
from specinfer.v1 import draft_pb2, draft_pb2_grpc
from specinfer.worker_process import ServedWorker, run_worker, serve_worker
from specinfer_draft.settings import Settings, parse_settings

SERVICE_NAME = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name


async def serve(settings: Settings, telemetry: Telemetry) -> None:
    """Serve until a signal ends the process; see `serve_worker`."""
    # Heavy imports wait until the flags are known to be good.
    from specinfer_draft.servicer import DraftServicer
    from specinfer_draft.worker import build_worker

    def build(on_failure: Callable[[], None]) -> ServedWorker:
        worker = build_worker(settings, on_failure)
        servicer = DraftServicer(worker.engine, worker.info, worker.grammars, telemetry)

        def count(registry: CollectorRegistry, *, vllm_names: bool) -> None:
            metrics = DraftMetrics(registry, worker.info, vllm_names=vllm_names)
            worker.engine.count_with(metrics)

        return ServedWorker(
            worker.engine,
            worker.info,
            lambda server: draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server),
            count=count,
        )

    await serve_worker(settings, tier="draft", service_name=SERVICE_NAME, build=build)


def main() -> int:
    """Exit status of the process; see `run_worker`."""
    return run_worker("specinfer_draft", lambda: parse_settings(sys.argv[1:], os.environ), serve)


if __name__ == "__main__":
    sys.exit(main())
