"""Where conversations live, so that they survive a process: in memory or in Redis."""

from specinfer_router.store.copies import StoreHooks
from specinfer_router.store.durable import DurableStore
from specinfer_router.store.interface import (
    ABANDONED,
    CANCELLED,
    ERROR,
    EVERY_SESSION,
    RESUMABLE,
    SessionFilter,
    SessionPage,
    SessionRecord,
    SessionStore,
    SessionSummary,
    SessionTerms,
)
from specinfer_router.store.memory import MemoryStore
from specinfer_router.store.outage import OutageLimits
from specinfer_router.store.redis_store import RedisStore

__all__ = [
    "ABANDONED",
    "CANCELLED",
    "ERROR",
    "EVERY_SESSION",
    "RESUMABLE",
    "DurableStore",
    "MemoryStore",
    "OutageLimits",
    "RedisStore",
    "SessionFilter",
    "SessionPage",
    "SessionRecord",
    "SessionStore",
    "SessionSummary",
    "SessionTerms",
    "StoreHooks",
]
