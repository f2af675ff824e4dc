"""`python -m specinfer_router`: read the settings, build in order, serve until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from specinfer import __version__
from specinfer.errors import SpecinferError, Unavailable
from specinfer.metrics import RouterMetrics
from specinfer.redis_registry import RedisPrefixes, RedisRegistry
from specinfer.server import (
    RpcServer,
    build_server,
    reporting_readiness,
    serve_until_signal,
)
from specinfer.settings import read_settings
from specinfer.telemetry import Telemetry, set_up
from specinfer_router.admin import Administration, Check, Identity
from specinfer_router.admin_servicer import SERVICE as ADMIN_SERVICE
from specinfer_router.admin_servicer import add_administration
from specinfer_router.cluster import Cluster
from specinfer_router.counted_store import CountedStore
from specinfer_router.counting import StoreCounts, show_store
from specinfer_router.diagnosis import certificate_findings, redis_findings
from specinfer_router.drain import LAST_SECONDS, drain
from specinfer_router.gateway.app import api_routes
from specinfer_router.gateway.operator import operator_routes
from specinfer_router.gateway.page import page_routes
from specinfer_router.gateway.responses_run import BackgroundRuns
from specinfer_router.gateway.responses_sweep import ResponseSweep
from specinfer_router.gateway.server import Gateway
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.keys.control import AccessControl, KeySource
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.redis_keys import RedisKeys
from specinfer_router.prefix_lookup import PrefixLookup
from specinfer_router.router import Router
from specinfer_router.servicer import SERVICE, add_generation
from specinfer_router.settings import KEYS_IN_REDIS, SERVE, RouterSettings
from specinfer_router.store import (
    DurableStore,
    MemoryStore,
    OutageLimits,
    RedisStore,
    SessionStore,
)
from specinfer_router.tokenizer import ServedTokenizer

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
        runs = BackgroundRuns()
        gateway = build_gateway(settings, access, routers, registry, telemetry, runs)
        stack.push_async_callback(gateway.stop)
        await access.start()
        await gateway.start()
        router = await build_router(settings, telemetry, registry, stack)
        routers.append(router)
        add_generation(server, router, access)
        await server.start()
        sweep = ResponseSweep(router, runs)
        stack.push_async_callback(sweep.close)
        sweep.start()
        await stack.enter_async_context(
            reporting_readiness(server, lambda: not router.not_ready_reason)
        )
        if admin is not None:
            ports = {"router": server.port, "gateway": gateway.port}
            add_administration(
                admin, build_administration(settings, router, registry, ports), access
            )
            await admin.start()
        log.info("serving", extra={"grpc_port": server.port, "gateway_port": gateway.port})

        limits = settings.drain_limits()
        # What runs, by gRPC or HTTP, has had its time; the grace is for what was already answered.
        await serve_until_signal(
            server,
            grace_seconds=LAST_SECONDS,
            on_drain=lambda: drain(router, server, runs, limits),
        )
        await gateway.stop()


def build_admin_server(settings: RouterSettings) -> RpcServer | None:
    """The server of the operators' port, bound, where there is to be one."""
    if not settings.admin:
        return None
    return build_server(
        settings.admin,
        [ADMIN_SERVICE],
        tls=settings.tls,
        insecure_bind=settings.insecure_bind,
        enable_reflection=settings.reflection,
    )


def build_administration(
    settings: RouterSettings,
    router: Router,
    registry: CollectorRegistry,
    ports: Mapping[str, int],
) -> Administration:
    """What operators are answered from; `ports` are those whose certificates are looked at."""
    connection = settings.redis_settings
    checks: list[Check] = []
    if connection is not None:
        checks.append(partial(redis_findings, connection))
    if settings.tls is not None:
        for name, port in ports.items():
            address = f"127.0.0.1:{port}"
            checks.append(
                partial(certificate_findings, f"certificate of the {name}", address, settings.tls)
            )
    return Administration(
        Identity(settings.router_id, __version__, "" if connection is None else connection.place),
        router=router,
        registry=registry,
        checks=checks,
    )


def build_gateway(
    settings: RouterSettings,
    access: AccessControl,
    routers: Sequence[Router],
    registry: CollectorRegistry,
    telemetry: Telemetry,
    runs: BackgroundRuns,
) -> Gateway:
    """The HTTP side of the one router that `routers` holds as soon as there is one."""

    def not_ready_reason() -> str:
        return routers[0].not_ready_reason if routers else "starting"

    def get_router() -> Router:
        if not routers:
            raise Unavailable("this router is starting", retry_after=1.0)
        return routers[0]

    return Gateway(
        settings.gateway,
        api_routes(get_router, streams=StreamSettings(settings.keep_alive_seconds), runs=runs),
        open_routes=[*operator_routes(not_ready_reason, registry), *page_routes()],
        authenticate=access.authenticate,
        cors_origins=settings.cors_origin,
        tls=settings.tls,
        insecure_bind=settings.insecure_bind,
        telemetry=telemetry,
    )


def build_key_source(settings: RouterSettings) -> KeySource | None:
    """Where the settings say that keys are, or None when nobody is asked for one."""
    if not settings.keys:
        return None
    if settings.keys == KEYS_IN_REDIS and settings.redis_settings is not None:
        return RedisKeys(settings.redis_settings)
    return KeyFile(Path(settings.keys))


async def build_router(
    settings: RouterSettings,
    telemetry: Telemetry,
    registry: CollectorRegistry,
    stack: AsyncExitStack,
) -> Router:
    """A router with its store and its workers connected; `stack` closes them."""
    counts = StoreCounts()
    store = build_store(settings, counts)
    stack.push_async_callback(store.close)
    await store.check()
    cluster = build_cluster(settings, stack)
    stack.push_async_callback(cluster.close)
    await cluster.start(seconds=settings.start_seconds)
    metrics = RouterMetrics(
        registry,
        cluster.target.model_name,
        model_hash=cluster.target.model_hash,
        version=__version__,
        vllm_names=settings.vllm_metrics,
    )
    show_store(metrics, store, counts)
    router = Router(
        cluster,
        store=CountedStore(store, metrics),
        tokenizer=await load_tokenizer(cluster, settings.max_prompt_characters),
        policy=settings.shape_policy(cluster.target.step_costs),
        metrics=metrics,
        version=__version__,
        limits=settings.limits(cluster.target.step_costs),
        telemetry=telemetry,
    )
    stack.callback(router.close)
    return router


def build_cluster(settings: RouterSettings, stack: AsyncExitStack) -> Cluster:
    """The workers that the settings name, and with a Redis those that are found there."""
    registry, prefixes = None, None
    connection = settings.redis_settings
    if connection is not None:
        registry = RedisRegistry(connection, settings.group)
        stack.push_async_callback(registry.close)
    if connection is not None and settings.prefix_seconds:
        directory = RedisPrefixes(connection, settings.group)
        stack.push_async_callback(directory.close)
        prefixes = PrefixLookup(directory, budget_seconds=settings.prefix_seconds)
    return Cluster(
        settings.verify,
        settings.draft,
        tls=settings.worker_tls,
        registry=registry,
        prefixes=prefixes,
    )


def build_store(settings: RouterSettings, counts: StoreCounts) -> SessionStore:
    """The session store that the settings name; raises InvalidRequest."""
    connection = settings.redis_settings
    if connection is None:
        return MemoryStore(
            max_sessions=settings.max_sessions,
            ttl_seconds=settings.session_seconds,
            holder=settings.router_id,
        )
    shared = RedisStore(
        connection,
        holder=settings.router_id,
        ttl_seconds=settings.session_seconds,
        lease_seconds=settings.lease_seconds,
    )
    return DurableStore(
        shared,
        OutageLimits(settings.redis_outage_seconds, serve_new=settings.redis_outage == SERVE),
        counts.hooks(),
    )


async def load_tokenizer(cluster: Cluster, max_prompt_characters: int) -> ServedTokenizer:
    """The target's tokenizer, from whichever verify worker is ready."""
    link = await cluster.verifiers.wait(seconds=5.0)
    files = await link.fetch_tokenizer()
    return await asyncio.to_thread(
        ServedTokenizer,
        files.tokenizer_json,
        chat_template=files.chat_template,
        eos_token_ids=files.eos_token_ids,
        bos_token=files.bos_token,
        eos_token=files.eos_token,
        max_prompt_characters=max_prompt_characters,
    )


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
        telemetry = set_up("specinfer-router", level=settings.log_level, traces=settings.traces)
        asyncio.run(serve(settings, telemetry))
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
