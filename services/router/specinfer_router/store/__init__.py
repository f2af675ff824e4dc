"""Where conversations live, so that they survive a process: in memory or in Redis."""

from specinfer_router.store.interface import SessionRecord, SessionStore
from specinfer_router.store.memory import MemoryStore
from specinfer_router.store.redis_store import RedisStore

__all__ = ["MemoryStore", "RedisStore", "SessionRecord", "SessionStore"]
