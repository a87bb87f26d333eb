"""Caps of tenants: what all transfers of one tenant send from this endpoint together, over whichever links."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import ConfigError
from .flow.pacing import Allowances, TokenBucket

if TYPE_CHECKING:
    from .sender import Sender

EVERY_S = 0.005


class TenantPacer:
    """One endpoint's. Works only while a capped tenant has a transfer on its way out."""

    def __init__(self, rates: Mapping[str, float]) -> None:
        self._loop = asyncio.get_running_loop()
        self._tenants: dict[str, Allowances[Sender]] = {}
        self._of: dict[Sender, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        for tenant, rate in rates.items():
            self.cap(tenant, rate)

    def cap(self, tenant: str, bytes_per_s: float | None) -> None:
        """From now on; None: no cap. Raises ConfigError for a rate that is not above 0."""
        if bytes_per_s is None:
            gone = self._tenants.pop(tenant, None)
            for sender in () if gone is None else list(gone.allowed):
                self._of.pop(sender, None)
                sender.allow(None)
            return
        if bytes_per_s <= 0:
            raise ConfigError(f"tenant {tenant!r} is capped at more than 0 bytes a second, got {bytes_per_s:g}")
        known = self._tenants.get(tenant)
        if known is not None:
            known.bucket.set_rate(bytes_per_s, self._loop.time())
        else:
            self._tenants[tenant] = Allowances(TokenBucket(bytes_per_s, self._loop.time()))

    def caps(self, tenant: str) -> bool:
        """Whether there is a cap for it."""
        return tenant in self._tenants

    def join(self, sender: Sender, tenant: str) -> None:
        """A transfer of ``tenant`` was opened; nothing of it was sent yet."""
        allowances = self._tenants.get(tenant)
        if allowances is not None:
            sender.allow(0)
            allowances.join(sender)
            self._of[sender] = tenant
            if self._timer is None:
                self._tick()

    def leave(self, sender: Sender) -> None:
        tenant = self._of.pop(sender, None)
        if tenant is not None:
            self._tenants[tenant].leave(sender, sender.stats.moved_bytes)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        now = self._loop.time()
        for allowances in self._tenants.values():
            if allowances.allowed:
                sent = [(sender, sender.stats.moved_bytes) for sender in allowances.allowed]
                for sender in allowances.divide(now, sent):
                    sender.allow(allowances.allowed[sender])
        self._timer = self._loop.call_later(EVERY_S, self._tick) if self._of else None
