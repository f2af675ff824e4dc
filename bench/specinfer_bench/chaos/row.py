"""What a row of a matrix is made of, whatever kind of cluster it is for.

This module knows nothing of processes, containers or any one fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar


class Cluster(Protocol):
    """What load and judgement need of a cluster."""

    @property
    def routers(self) -> Sequence[str]:
        """gRPC addresses for clients."""
        ...

    @property
    def gateways(self) -> Sequence[str]:
        """HTTP addresses for clients."""
        ...

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        ...

    async def heal(self) -> None:
        """Undo every fault and wait until all is as at the start; raises SpecinferError."""
        ...


AnyCluster = TypeVar("AnyCluster", bound=Cluster)


@dataclass(frozen=True)
class Action(Generic[AnyCluster]):
    """One thing that is done, and its name for people."""

    text: str
    run: Callable[[AnyCluster], Awaitable[None]]


@dataclass(frozen=True)
class Row(Generic[AnyCluster]):
    """One fault.

    Attributes:
        name: what it is called on the command line.
        fault: what happens, for people.
        actions: what is done, in order, once every stream flows.
        left: what is there all the time.
        settle_seconds: how long streams go on after the last action; pauses count until then.
        options: fields of the cluster's options that this row needs otherwise.
        background: have responses without a reader instead of streams.
    """

    name: str
    fault: str
    actions: tuple[Action[AnyCluster], ...]
    left: str
    settle_seconds: float = 3.0
    options: dict[str, Any] = field(default_factory=dict)
    background: bool = False


def hold(seconds: float) -> Action[Any]:
    """Nothing for a while."""
    return Action(f"{seconds:g} s", lambda cluster: asyncio.sleep(seconds))
