"""A whole cluster in this process: a router and real workers over tiny checkpoints, counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from specinfer.messages import ShapeQuery
from specinfer.metrics import DraftMetrics, RouterMetrics, VerifyMetrics
from specinfer.metrics.metric import Source
from specinfer.server import build_server
from specinfer.v1 import draft_pb2_grpc, verify_pb2_grpc
from specinfer_draft.servicer import DraftServicer
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_draft.worker import build_worker as build_drafter
from specinfer_router.building import load_tokenizer
from specinfer_router.cluster import Cluster
from specinfer_router.counted_store import CountedStore
from specinfer_router.counting import StoreCounts, show_store
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import StaticShape
from specinfer_router.router import Router, RouterLimits
from specinfer_router.store import MemoryStore
from specinfer_verify.servicer import VerifyServicer
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import build_worker as build_verifier


@dataclass(frozen=True)
class LiveCluster:
    """A router, and what each process would show under /metrics."""

    router: Router
    registries: dict[Source, CollectorRegistry]


@asynccontextmanager
async def live_cluster(
    target: Path, draft: Path, limits: RouterLimits | None = None
) -> AsyncIterator[LiveCluster]:
    """Everything but processes; metrics under vLLM's names too."""
    registries = {source: CollectorRegistry() for source in Source}
    async with AsyncExitStack() as stack:
        verify = await _served_verifier(target, registries[Source.VERIFY], stack)
        drafter = await _served_drafter(draft, registries[Source.DRAFT], stack)
        cluster = Cluster([verify], [drafter])
        stack.push_async_callback(cluster.close)
        await cluster.start(seconds=20)
        metrics = RouterMetrics(
            registries[Source.ROUTER], "tiny", model_hash="m", version="1", vllm_names=True
        )
        store = MemoryStore()
        show_store(metrics, store, StoreCounts())
        router = Router(
            cluster,
            store=CountedStore(store, metrics),
            tokenizer=await load_tokenizer(cluster, 100_000),
            policy=StaticShape(ShapeQuery(max_nodes=12, max_depth=5)),
            metrics=metrics,
            version="1",
            limits=limits or RouterLimits(seats=SeatLimits(propose_seconds=10.0)),
        )
        stack.callback(router.close)
        yield LiveCluster(router, registries)


async def _served_verifier(model: Path, registry: CollectorRegistry, stack: AsyncExitStack) -> str:
    settings = VerifySettings(model=model, dtype="float32", kv_blocks=256, block_size=4)
    worker = await asyncio.to_thread(build_verifier, settings)
    files, ends = worker.loaded.tokenizer_files, worker.loaded.eos_token_ids
    servicer = VerifyServicer(worker.engine, worker.info, files, ends)
    server = build_server("127.0.0.1:0", [])
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(servicer, server.server)
    worker.engine.count_with(VerifyMetrics(registry, worker.info, vllm_names=True))
    worker.engine.start()
    stack.callback(worker.engine.stop)
    await server.start()
    stack.push_async_callback(server.drain, 0)
    return f"127.0.0.1:{server.port}"


async def _served_drafter(model: Path, registry: CollectorRegistry, stack: AsyncExitStack) -> str:
    settings = DraftSettings(model=model, dtype="float32", kv_blocks=256, block_size=4)
    worker = await asyncio.to_thread(build_drafter, settings)
    servicer = DraftServicer(worker.engine, worker.info, worker.grammars)
    server = build_server("127.0.0.1:0", [])
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server.server)
    worker.engine.count_with(DraftMetrics(registry, worker.info, vllm_names=True))
    worker.engine.start()
    stack.callback(worker.engine.stop)
    await server.start()
    stack.push_async_callback(server.drain, 0)
    return f"127.0.0.1:{server.port}"
