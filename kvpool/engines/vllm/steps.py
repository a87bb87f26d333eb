"""What the scheduler's side tells the workers each step: plain data, pickled by vLLM where workers are processes."""

from __future__ import annotations

from dataclasses import dataclass, field

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks of one group: ``ids[i]`` is the engine's block of tokens ``[(first + i) * block_tokens, …)``.

    For a recurrent group the one block that holds the state; ``first`` is then 0.
    """

    first: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendStep:
    """What this step makes ready of a request that another engine decodes; ``runs`` by the engine's group, None: nothing."""

    request: str
    transfer: bytes
    address: Address | None
    boundary: int
    """Tokens of the whole transfer."""
    runs: tuple[BlockRun | None, ...]
    final: bool
    """Everything up to the boundary is ready after this step."""


@dataclass(frozen=True, slots=True)
class ReceiveJob:
    """A request whose cache is to come: blocks by the engine's group, the first ``resident`` tokens are here already."""

    request: str
    transfer: bytes
    address: Address | None
    boundary: int
    resident: int
    runs: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class EndSend:
    """A request that ends before all of it was computed. ``request`` is None when nothing was handed over yet."""

    request: str | None
    transfer: bytes
    address: Address | None
    boundary: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A transfer that this side will not take after all."""

    transfer: bytes
    address: Address | None
    reason: str


@dataclass(slots=True)
class Step:
    """One scheduler step, for every worker."""

    preempted: list[str] = field(default_factory=list)
    """Requests whose blocks are given to others in this step: nothing of theirs may be read afterwards."""
    sends: list[SendStep] = field(default_factory=list)
    ended: list[EndSend] = field(default_factory=list)
    receives: list[ReceiveJob] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Receiving requests that were aborted."""
    refused: list[Refusal] = field(default_factory=list)
