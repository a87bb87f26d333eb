"""``kvpool.connect``: one name for a daemon, a cluster's directory, and a list of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError

from .client import PoolClient
from .client import connect as connect_node

if TYPE_CHECKING:
    from .cluster.pool import ClusterPool


@overload
async def connect(
    target: str, port: int, *, connections: int | None = None, config: EndpointConfig | None = None
) -> PoolClient: ...
@overload
async def connect(target: str | Sequence[str], port: None = None, **options: Any) -> ClusterPool: ...
async def connect(target: str | Sequence[str], port: int | None = None, **options: Any) -> PoolClient | ClusterPool:
    """Connect to a pool on the network; whatever it is, the interface is :class:`kvpool.PoolProtocol`.

    ``connect("127.0.0.1", 7777)``: one kvpoold. ``connect("valkey://10.0.0.5:6379?name=pool")``: the nodes that a directory knows.
    ``connect(["10.0.0.7:7777", "10.0.0.8:7777"])``: these nodes. The options of the latter two are those of
    :func:`kvpool.cluster.pool.connect_cluster`. Raises ConnectError, HandshakeError, InsecureBindError, ConfigError, DirectoryError,
    NoNodeError.

    >>> async with await connect("127.0.0.1", 7777) as pool:  # doctest: +SKIP
    ...     print(await pool.stat())
    """
    if port is not None:
        if not isinstance(target, str):
            raise ConfigError("a port goes with one host; a list of nodes has them as HOST:PORT")
        return await connect_node(target, port, **options)
    if isinstance(target, str) and "://" not in target:
        raise ConfigError(
            f"connect({target!r}) needs a port; a directory is a URL such as valkey://HOST:PORT, nodes are a list"
        )
    from .cluster.pool import connect_cluster

    return await connect_cluster(target, **options)
