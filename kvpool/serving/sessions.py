"""Who calls: a session a link."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from kvtransport.errors import KVError, RefusedError
from kvtransport.link import Link

from ..core import PoolCore
from ..flat import FlatPut
from ..keys import Namespace
from ..messages import Args
from ..security import tenant_of


class Session:
    """What one link has opened here. The tenant is the session's, never the request's."""

    def __init__(self, link: Link, tenant: str) -> None:
        self.link = link
        self.tenant = tenant
        self.namespaces: dict[bytes, Namespace] = {}
        self.leases: set[int] = set()
        self.puts: dict[bytes, FlatPut] = {}
        """Objects on their way, by transfer."""

    @property
    def is_node(self) -> bool:
        """Whether its certificate says that it is a node of the cluster."""
        return self.link.identity is not None and self.link.identity.node

    def speaks_for(self, tenant: str | None) -> str:
        """The tenant of a namespace that names one: the session's own, or any for a node of the cluster. Raises RefusedError."""
        if tenant is None or tenant == self.tenant:
            return self.tenant
        if not self.is_node:
            raise RefusedError(
                f"this session is tenant {self.tenant!r} and cannot speak for {tenant!r}: connect as that tenant; only nodes of "
                "the cluster, by a certificate with a URI kvpool://node/NAME, copy what belongs to others"
            )
        return tenant


Verb: TypeAlias = Callable[[Session, Args], Awaitable[dict[str, Any]]]


class Sessions:
    """The sessions of one server."""

    def __init__(self, core: PoolCore) -> None:
        self._core = core
        self._by_link: dict[Link, Session] = {}
        self.only_tenant: str | None = None
        """Whom alone it serves, when set: one whose clients may map the memory."""

    def of(self, link: Link) -> Session:
        """The session of a link, begun with its first call. Raises RefusedError."""
        session = self._by_link.get(link)
        if session is None:
            tenant = tenant_of(link.identity)
            if self.only_tenant is not None and tenant != self.only_tenant:
                raise RefusedError(
                    "this pool lends its memory to local clients of one tenant and serves no other: use another pool"
                )
            session = self._by_link[link] = Session(link, tenant)
            link.on_end(lambda: self._leave(session))
        return session

    def _leave(self, session: Session) -> None:
        """A client is gone: its leases with it (its transfers end with the link)."""
        self._by_link.pop(session.link, None)
        for lease in session.leases:
            try:
                self._core.release(lease)
            except KVError:
                continue  # its deadline came first

    def check_lends(self) -> None:
        """Raises RefusedError when the memory is not to be mapped."""
        if self.only_tenant is None:
            raise RefusedError("this pool does not lend its memory to local clients: it has no local_socket")
