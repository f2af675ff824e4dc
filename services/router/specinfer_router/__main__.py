"""`python -m specinfer_router`: read the settings, build in order, serve until told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from uuid import uuid4

from prometheus_client import CollectorRegistry

from specinfer.errors import SpecinferError
from specinfer.server import (
    RpcServer,
    build_server,
    fastest_loop,
    reporting_readiness,
    serve_until_signal,
)
from specinfer.settings import read_settings
from specinfer.telemetry import Telemetry, set_up
from specinfer_router.admin_servicer import add_administration
from specinfer_router.building import (
    build_admin_server,
    build_administration,
    build_cluster,
    build_gateway,
    build_key_source,
    build_metrics_server,
    build_router,
    build_store,
)
from specinfer_router.counting import StoreCounts
from specinfer_router.drain import LAST_SECONDS, drain
from specinfer_router.gateway.responses_run import BackgroundRuns
from specinfer_router.gateway.responses_sweep import ResponseSweep
from specinfer_router.keys.control import AccessControl
from specinfer_router.router import Router
from specinfer_router.servicer import SERVICE, add_generation
from specinfer_router.settings import RouterSettings

log = logging.getLogger("specinfer_router")


async def serve(settings: RouterSettings, telemetry: Telemetry) -> None:
    """Run a router until SIGTERM or SIGINT; raises SpecinferError when it cannot start."""
    async with AsyncExitStack() as stack:
        # Both ports first: one in use is told before anybody waits for workers.
        server = build_server(
            settings.grpc,
            [SERVICE],
            tls=settings.tls,
            insecure_bind=settings.insecure_bind,
            enable_reflection=settings.reflection,
        )
        stack.push_async_callback(server.server.stop, 0)
        admin = build_admin_server(settings)
        if admin is not None:
            stack.push_async_callback(admin.server.stop, 0)
        access = AccessControl(build_key_source(settings))
        stack.push_async_callback(access.close)
        routers: list[Router] = []
        registry = CollectorRegistry()
        metrics = build_metrics_server(settings, registry)
        if metrics is not None:
            stack.push_async_callback(metrics.stop)
            await metrics.start()
        runs = BackgroundRuns()
        gateway = build_gateway(settings, access, routers, registry, telemetry, runs)
        stack.push_async_callback(gateway.stop)
        await access.start()
        await gateway.start()
        counts = StoreCounts()
        store = build_store(settings, counts)
        stack.push_async_callback(store.close)
        await store.check()
        cluster = build_cluster(settings, stack)
        stack.push_async_callback(cluster.close)
        ports = {"grpc_port": server.port, "gateway_port": gateway.port}
        if metrics is not None:
            ports["metrics_port"] = metrics.port
        if admin is not None:
            # Operators are answered while it waits, or they could not tell what for.
            ports["admin_port"] = admin.port
            administration = build_administration(
                settings, cluster, store, routers, registry, ports
            )
            add_administration(admin, administration, access)
            await admin.start()
        log.info("waiting for a verify worker", extra={**ports, **settings.workers_wanted})
        await cluster.start(seconds=settings.start_seconds)
        router = await build_router(settings, telemetry, registry, cluster, store, counts, stack)
        routers.append(router)
        add_generation(server, router, access)
        await _serve_users(settings, server, router, runs, ports)
        await gateway.stop()


def _collect_rarely() -> None:
    """Look for garbage less often than Python would, which costs a router a twentieth of its time.

    What the last requests did is kept for whoever asks, lives long and has no cycles; what was
    loaded stays for good. Hardly anything but failures makes cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _serve_users(
    settings: RouterSettings,
    server: RpcServer,
    router: Router,
    runs: BackgroundRuns,
    ports: Mapping[str, int],
) -> None:
    """Take requests until a signal, and drain."""
    await server.start()
    _collect_rarely()
    sweep = ResponseSweep(router, runs)
    sweep.start()
    limits = settings.drain_limits()
    try:
        async with reporting_readiness(server, lambda: not router.not_ready_reason):
            log.info("serving", extra=dict(ports))
            # What runs, by gRPC or HTTP, has had its time; the grace is for what was answered.
            await serve_until_signal(
                server,
                grace_seconds=LAST_SECONDS,
                on_drain=lambda: drain(router, server, runs, limits),
            )
    finally:
        await sweep.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a router; 0 after an orderly end, 1 with a message when it cannot serve."""
    telemetry = Telemetry()
    try:
        settings = read_settings(
            RouterSettings,
            program="specinfer-router",
            description="Serves generations: holds sessions, asks drafters, has targets verify.",
            prefix="SPECINFER_ROUTER",
            arguments=sys.argv[1:] if arguments is None else arguments,
            environment=os.environ,
        )
        # One name for leases, operators and logs.
        settings = replace(settings, router_id=settings.router_id or f"router-{uuid4().hex[:12]}")
        telemetry = set_up("specinfer-router", level=settings.log_level, traces=settings.traces)
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            runner.run(serve(settings, telemetry))
    except SpecinferError as error:
        print(f"specinfer-router: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        telemetry.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
