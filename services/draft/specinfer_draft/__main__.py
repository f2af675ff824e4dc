"""Starts a draft worker: settings, model, engine, server. Wiring only."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from specinfer.errors import SpecinferError
from specinfer.server import build_server, serve_until_signal
from specinfer.v1 import draft_pb2_grpc
from specinfer_draft.settings import Settings, parse_settings


async def serve(settings: Settings) -> None:
    """Serve until a signal ends the process; growing trees then have `drain_seconds`."""
    # Heavy imports wait until the flags are known to be good.
    from specinfer_draft.servicer import SERVICE_NAME, DraftServicer
    from specinfer_draft.worker import build_worker

    server = build_server(
        settings.address,
        [SERVICE_NAME],
        tls=settings.tls,
        insecure_bind=settings.insecure_bind,
        enable_reflection=settings.reflection,
    )
    loop = asyncio.get_running_loop()

    failed = asyncio.Event()

    def report_failure() -> None:
        loop.call_soon_threadsafe(failed.set)

    worker = await asyncio.to_thread(build_worker, settings, report_failure)
    servicer = DraftServicer(worker.engine, worker.info, worker.grammars)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server.server)
    worker.engine.start()
    await server.start()

    async def drain() -> None:
        await asyncio.to_thread(worker.engine.drain, settings.drain_seconds)

    ending = asyncio.create_task(
        serve_until_signal(server, grace_seconds=1.0, on_drain=drain, failed=failed)
    )
    await asyncio.sleep(0)  # whoever reads the next line may send a signal, so it listens first
    print(f"draft worker {worker.info.worker_id} ready on port {server.port}", flush=True)
    try:
        await ending
    finally:
        await asyncio.to_thread(worker.engine.stop)


def main() -> int:
    """Exit status 0 after a drain, 1 with one line when it cannot start or its engine fails."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(serve(parse_settings(sys.argv[1:], os.environ)))
    except SpecinferError as error:
        print(f"specinfer_draft: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
