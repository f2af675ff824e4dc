"""Makes a router's parts from its settings: store, workers, gateway, operators' port.

This module knows the settings and nothing of when its parts begin and end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from specinfer import __version__
from specinfer.errors import Unavailable
from specinfer.messages import StepCost
from specinfer.metrics import MetricsServer, RouterMetrics
from specinfer.redis_registry import RedisPrefixes, RedisRegistry
from specinfer.server import RpcServer, build_server
from specinfer.telemetry import Telemetry
from specinfer.unix_sockets import socket_path
from specinfer_router.admin import Administration, Check, Identity
from specinfer_router.admin_servicer import SERVICE as ADMIN_SERVICE
from specinfer_router.cluster import Cluster
from specinfer_router.counted_store import CountedStore
from specinfer_router.counting import StoreCounts, show_store
from specinfer_router.diagnosis import certificate_findings, redis_findings
from specinfer_router.gateway.app import api_routes
from specinfer_router.gateway.operator import operator_routes
from specinfer_router.gateway.page import page_routes
from specinfer_router.gateway.responses_run import BackgroundRuns
from specinfer_router.gateway.server import Gateway
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.keys.control import AccessControl, KeySource
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.redis_keys import RedisKeys
from specinfer_router.prefix_lookup import PrefixLookup
from specinfer_router.router import Router
from specinfer_router.settings import KEYS_IN_REDIS, SERVE, RouterSettings
from specinfer_router.store import (
    DurableStore,
    MemoryStore,
    OutageLimits,
    RedisStore,
    SessionStore,
)
from specinfer_router.store.redis_memory import RedisMemory
from specinfer_router.tokenizer import ServedTokenizer

# Where a server that listens everywhere is reached from here.
REACHED_AT = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}


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


def build_metrics_server(
    settings: RouterSettings, registry: CollectorRegistry
) -> MetricsServer | None:
    """The server of the metrics' own port, bound, where there is to be one."""
    if not settings.metrics:
        return None
    return MetricsServer(
        settings.metrics, registry, tls=settings.tls, insecure_bind=settings.insecure_bind
    )


def build_administration(
    settings: RouterSettings,
    cluster: Cluster,
    store: SessionStore,
    routers: Sequence[Router],
    registry: CollectorRegistry,
    ports: Mapping[str, int],
) -> Administration:
    """What operators are answered from; `ports` are those whose certificates are looked at.

    As for the gateway, `routers` holds the one router as soon as there is one.
    """
    connection = settings.redis_settings
    checks: list[Check] = []
    if connection is not None:
        checks.append(partial(redis_findings, connection))
    if settings.tls is not None:
        for name, port in ports.items():
            bound = getattr(settings, name.removesuffix("_port"))
            if socket_path(bound) is not None:
                continue
            host = bound.rpartition(":")[0]
            address = f"{REACHED_AT.get(host, host)}:{port}"
            check = f"certificate of {name}"
            checks.append(partial(certificate_findings, check, address, settings.tls))
    return Administration(
        Identity(settings.router_id, __version__, "" if connection is None else connection.place),
        cluster=cluster,
        store=store,
        get_router=lambda: routers[0] if routers else None,
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

    shown = None if settings.metrics else registry
    return Gateway(
        settings.gateway,
        api_routes(get_router, streams=StreamSettings(settings.keep_alive_seconds), runs=runs),
        open_routes=[*operator_routes(not_ready_reason, shown), *page_routes()],
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
    cluster: Cluster,
    store: SessionStore,
    counts: StoreCounts,
    stack: AsyncExitStack,
) -> Router:
    """A router on a store and workers that are connected; `stack` closes it."""
    metrics = RouterMetrics(
        registry,
        cluster.target.model_name,
        model_hash=cluster.target.model_hash,
        version=__version__,
        vllm_names=settings.vllm_metrics,
    )
    show_store(metrics, store, counts, watch_memory(settings, stack))
    router = Router(
        cluster,
        store=CountedStore(store, metrics),
        tokenizer=await load_tokenizer(cluster, settings.max_prompt_characters),
        policy=settings.shape_policy(cluster.target.step_costs, lambda: draft_costs(cluster)),
        metrics=metrics,
        version=__version__,
        limits=settings.limits(cluster.target.step_costs),
        telemetry=telemetry,
    )
    stack.callback(router.close)
    return router


def draft_costs(cluster: Cluster) -> tuple[StepCost, ...]:
    """What some drafter's passes cost by its own measurement; nothing while none was heard of."""
    known = (link.info.step_costs for link in cluster.drafters.links if link.info is not None)
    return next(known, ())


def watch_memory(settings: RouterSettings, stack: AsyncExitStack) -> RedisMemory | None:
    """What asks Redis now and then how full it is; None without one."""
    connection = settings.redis_settings
    if connection is None:
        return None
    memory = RedisMemory(connection)
    stack.push_async_callback(memory.close)
    memory.start()
    return memory


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
