"""The directory in Valkey or Redis: standalone, Sentinel or Cluster, through redis-py's asyncio client.

Keys, for a pool named ``kv``::

    kvp:{kv}:epoch       random, set once: losing everything loses it too
    kvp:{kv}:nodes       set of node ids
    kvp:{kv}:node:<id>   a member's record (msgpack), expires with its TTL
    kvp:kv:<16 bytes>    hash of a segment: 8 bytes of the namespace and node id -> entry (see entries.py), expires unless
                         said again

Nothing is read, changed and written back: every field has one writer, so no script and no lock is needed.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

from kvpool.errors import DirectoryError
from kvtransport.errors import ConfigError, ProtocolError

from .members import Member, Snapshot
from .segments import PLACE_BYTES, TAG_BYTES
from .tasks import end

DEFAULT_NAME = "kvpool"
T = TypeVar("T")

SCHEMES = {
    "valkey": "redis",
    "valkeys": "rediss",
    "redis": "redis",
    "rediss": "rediss",
    "valkey+sentinel": "sentinel",
    "valkeys+sentinel": "sentinels",
    "valkey+cluster": "cluster",
    "valkeys+cluster": "clusters",
}
URL_HELP = (
    "write valkey://HOST:PORT/DB?name=POOL (valkeys:// for TLS, with &ssl_ca_certs=PATH of the authority's PEM file where the "
    "system does not know it; user:password@ for ACLs), valkey+sentinel://HOST:PORT,HOST:PORT/SERVICE or valkey+cluster://HOST:PORT"
)
READS = ("get", "mget", "smembers", "hgetall")
"""Commands that a client sends; on the keys that :func:`rights` names."""
WRITES = ("set", "del", "sadd", "srem", "hset", "hdel", "pexpire")
"""Commands that a node sends as well."""
CLUSTER_RIGHTS = "+cluster|slots +command"
"""What redis-py sends besides to a Valkey Cluster, to learn where keys are."""
SSL_OPTIONS = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")


def rights(name: str, *, writes: bool) -> str:
    """The rules of ``ACL SETUSER USER on >PASSWORD ...`` for a node (``writes``) or a client of the pool ``name``, and no more."""
    commands = (*READS, *(WRITES if writes else ()))
    return f"resetkeys {'~' if writes else '%R~'}kvp:{{{name}}}:* {'~' if writes else '%R~'}kvp:{name}:* " + " ".join(
        f"+{c}" for c in commands
    )


class ValkeyDirectory:
    """Made by :func:`open_directory`. ``entropy(n)`` gives random bytes for a new epoch."""

    def __init__(self, client: Any, *, name: str = DEFAULT_NAME, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._client = client
        self._entropy = entropy
        prefix = f"kvp:{{{name}}}:".encode()
        self._epoch_key, self._nodes_key, self._node_key = prefix + b"epoch", prefix + b"nodes", prefix + b"node:"
        self._segment_key = f"kvp:{name}:".encode()
        self._name = name
        self._asking: set[asyncio.Task[Any]] = set()

    async def beat(self, member: Member, ttl_s: float) -> bytes:
        pipe = self._client.pipeline(transaction=False)
        pipe.set(self._epoch_key, self._entropy(8), nx=True)
        pipe.get(self._epoch_key)
        pipe.set(self._node_key + member.id.encode(), member.encode(), px=max(int(ttl_s * 1000), 1))
        pipe.sadd(self._nodes_key, member.id)
        return bytes((await self._ask(pipe.execute()))[1])

    async def leave(self, member: Member) -> None:
        key = self._node_key + member.id.encode()
        record = await self._ask(self._client.get(key))
        known = None if record is None else self._decode(record)
        if known is None or known.incarnation == member.incarnation:
            pipe = self._client.pipeline(transaction=False)
            pipe.delete(key)
            pipe.srem(self._nodes_key, member.id)
            await self._ask(pipe.execute())

    async def snapshot(self) -> Snapshot:
        pipe = self._client.pipeline(transaction=False)
        pipe.get(self._epoch_key)
        pipe.smembers(self._nodes_key)
        epoch, ids = await self._ask(pipe.execute())
        if not ids:
            return Snapshot(epoch, ())
        records = await self._ask(self._client.mget([self._node_key + i for i in sorted(ids)]))
        members = [self._decode(r) for r in records if r is not None]
        return Snapshot(epoch, tuple(m for m in members if m is not None))

    @staticmethod
    def _decode(record: bytes) -> Member | None:
        try:
            return Member.decode(record)
        except ProtocolError:
            return None  # not ours: someone else writes there, or another version

    async def announce(self, node: str, changes: Mapping[bytes, bytes | None], ttl_s: float) -> None:
        if not changes:
            return
        pipe = self._client.pipeline(transaction=False)
        ttl_ms = max(int(ttl_s * 1000), 1)
        for name, entry in changes.items():
            key, field = self._segment_key + name[:PLACE_BYTES], name[PLACE_BYTES:] + node.encode()
            if entry is None:
                pipe.hdel(key, field)
            else:
                pipe.hset(key, field, entry)
                pipe.pexpire(key, ttl_ms)
        await self._ask(pipe.execute())

    async def look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        if not keys:
            return []
        # What is stored of one segment under several namespaces (blocks, states) lies in one hash.
        places = dict.fromkeys(name[:PLACE_BYTES] for name in keys)
        pipe = self._client.pipeline(transaction=False)
        for place in places:
            pipe.hgetall(self._segment_key + place)
        answers = dict(zip(places, await self._ask(pipe.execute()), strict=True))
        out = []
        for name in keys:
            tag = name[PLACE_BYTES:]
            found = answers[name[:PLACE_BYTES]].items()
            out.append({f[TAG_BYTES:].decode("utf-8", "replace"): e for f, e in found if f[:TAG_BYTES] == tag})
        return out

    async def close(self) -> None:
        await end(self._asking)
        await self._client.aclose()
        manager = getattr(getattr(self._client, "connection_pool", None), "sentinel_manager", None)
        for sentinel in () if manager is None else manager.sentinels:
            await sentinel.aclose()

    async def _ask(self, work: Awaitable[T]) -> T:
        from redis.exceptions import RedisClusterException, RedisError

        # In a task of its own: redis-py waits by asyncio.wait_for, which in Python 3.11 swallows a cancellation that comes together with what
        # it waits for. Whoever asks would then go on, past its deadline too: a timeout cancels once.
        async def ask() -> T:
            return await work

        asking = asyncio.get_running_loop().create_task(ask(), name="ask the directory")
        self._asking.add(asking)
        asking.add_done_callback(self._answered)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            raise self._explained(error) from error

    def _answered(self, asking: asyncio.Task[Any]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # looked at, also when nobody waits any more

    def _explained(self, error: Exception) -> DirectoryError:
        """What to do about it, where somebody must do something; what passes by itself is retryable."""
        from redis.exceptions import AuthenticationError, NoPermissionError, RedisClusterException

        text = str(error)
        if isinstance(error, RedisClusterException) and "not enabled" in text:  # said, too, of a user who may not ask for the slots
            return DirectoryError(
                f"the directory is no Valkey Cluster (valkey:// is the scheme of one server), or its user lacks {CLUSTER_RIGHTS}: {text}",
                retryable=False,
            )
        if isinstance(error, NoPermissionError) or "NOPERM" in text:
            found = re.search(r"'([a-z|]+)' command", text)
            lacks = f"the right to '{found[1]}'" if found else "the right to these keys"
            return DirectoryError(
                f"the directory's user lacks {lacks}: a node needs ACL SETUSER USER on >PASSWORD "
                f"{rights(self._name, writes=True)}; for a client that does not join, {rights(self._name, writes=False)}; "
                f"in a Valkey Cluster {CLUSTER_RIGHTS} as well",
                retryable=False,
            )
        if isinstance(error, AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
            return DirectoryError(
                f"the directory does not take this user and password ({text}): write user:password@ (or :password@) before "
                "its host, or have the user made with ACL SETUSER",
                retryable=False,
            )
        if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
            return DirectoryError(
                f"the directory's certificate is not one that is trusted here ({text}): say ssl_ca_certs=PATH of its authority's "
                "PEM file in the URL's query, and dial it by a name in the certificate",
                retryable=False,
            )
        return DirectoryError(f"the directory cannot be asked: {type(error).__name__} {error}")


def open_directory(
    url: str, *, timeout_s: float = 1.0, entropy: Callable[[int], bytes] = os.urandom
) -> ValkeyDirectory:
    """The directory at ``url``; connects when first asked. Raises ConfigError for an unusable URL, or without redis-py."""
    try:
        from redis import asyncio as redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ConfigError(
            "a directory in Valkey or Redis needs redis-py: pip install 'kvtransport[cluster]'"
        ) from error
    parts = urlsplit(url)
    scheme = SCHEMES.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise ConfigError(f"{_hidden(url)!r} is no directory: {URL_HELP}")
    query = parse_qs(parts.query)
    name = query.pop("name", [DEFAULT_NAME])[-1]
    rest = "&".join(f"{k}={v}" for k, values in query.items() for v in values)
    # A dead server is noticed within the timeout; whoever asks decides whether to ask again.
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }
    try:
        if scheme.startswith("sentinel"):
            if scheme == "sentinels":  # the sentinels and the servers they name
                options |= {"ssl": True, **{k: query.pop(k)[-1] for k in SSL_OPTIONS if k in query}}
            if query:
                raise ValueError(f"{', '.join(query)}: not known with Sentinel")
            return ValkeyDirectory(_sentinel(redis, parts.netloc, parts.path, options), name=name, entropy=entropy)
        if scheme.startswith("cluster"):
            plain = urlunsplit(("rediss" if scheme == "clusters" else "redis", parts.netloc, parts.path, rest, ""))
            client: Any = redis.RedisCluster.from_url(plain, **{**options, "retry": Retry(NoBackoff(), 1)})
        else:
            client = redis.Redis.from_url(urlunsplit((scheme, parts.netloc, parts.path, rest, "")), **options)
    except ValueError as error:
        raise ConfigError(f"{_hidden(url)!r} is no directory ({error}): {URL_HELP}") from error
    return ValkeyDirectory(client, name=name, entropy=entropy)


def _sentinel(redis: Any, netloc: str, path: str, options: dict[str, Any]) -> Any:
    credentials, _, hosts = netloc.rpartition("@")
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise ValueError("the name of the service is missing")
    addresses = []
    for host in hosts.split(","):
        name, _, port = host.rpartition(":")
        addresses.append((name or port, int(port) if name else 26379))
    user, _, password = credentials.partition(":")
    login = {"username": user or None, "password": password or None} if credentials else {}
    sentinel = redis.Sentinel(addresses, sentinel_kwargs=options, **options)
    return sentinel.master_for(service, db=int(database or 0), **login)


def _hidden(url: str) -> str:
    """``url`` without its password."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    if not at:
        return url
    user = credentials.partition(":")[0]
    return urlunsplit((parts.scheme, f"{user}:***@{hosts}", parts.path, parts.query, ""))
