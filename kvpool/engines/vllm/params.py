"""``kv_transfer_params`` of a request: what a router tells both engines so that they meet.

The consumer (or the router on its behalf) names the transfer: 16 random bytes, as 32 hexadecimal digits, fresh for every request.
Both requests may be sent at the same time.

    prefill: {"do_remote_decode": true, "transfer_id": "…", "remote_host": decode's address, "remote_port": its listen_port}
    decode:  {"do_remote_prefill": true, "transfer_id": "…"}

With ``dial = "consumer"`` address and port are prefill's, and stand in decode's request. They travel in
``SamplingParams(extra_args={"kv_transfer_params": …})``, or in the ``kv_transfer_params`` field of an OpenAI-style request.
Other keys are ignored, for routers that serve several connectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from kvtransport.errors import ConfigError

Side = Literal["send", "receive"]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a request's cache goes to or comes from. ``address`` is the peer's rank 0, on the side that dials."""

    side: Side
    transfer: bytes
    address: tuple[str, int] | None


class _Params(msgspec.Struct, frozen=True):
    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    transfer_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{32}$")] | None = None
    remote_host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)] | None = None
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65_535)] | None = None


def read_params(
    params: Mapping[str, Any] | None, *, dial: Literal["producer", "consumer"], producer: bool, consumer: bool
) -> Rendezvous | None:
    """What ``params`` ask of an engine with these roles; None when they ask nothing. Raises ConfigError naming the key."""
    if not params or not (params.get("do_remote_decode") or params.get("do_remote_prefill")):
        return None
    try:
        read = msgspec.convert(dict(params), _Params)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"kv_transfer_params: {error}") from None
    if read.do_remote_decode and read.do_remote_prefill:
        raise ConfigError("kv_transfer_params: do_remote_decode and do_remote_prefill exclude each other")
    side: Side = "send" if read.do_remote_decode else "receive"
    if not (producer if side == "send" else consumer):
        raise ConfigError(
            f"kv_transfer_params: this engine cannot {side} caches; its kv_role is {'kv_producer' if producer else 'kv_consumer'}"
        )
    if read.transfer_id is None:
        raise ConfigError(
            "kv_transfer_params: transfer_id is missing: 32 hexadecimal digits, the same for both engines"
        )
    dials = (dial == "producer") == (side == "send")
    if not dials:
        return Rendezvous(side, bytes.fromhex(read.transfer_id), None)
    if read.remote_host is None or read.remote_port is None:
        peer = "decode" if side == "send" else "prefill"
        raise ConfigError(
            f"kv_transfer_params: remote_host and remote_port are missing: where the {peer} engine listens (dial = {dial!r})"
        )
    return Rendezvous(side, bytes.fromhex(read.transfer_id), (read.remote_host, read.remote_port))
