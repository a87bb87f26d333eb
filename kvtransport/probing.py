"""Addresses under which others shall reach a process: said in its HELLO, tried by whoever it dials, and the verdict told to it.

A process that advertises an address nobody can dial looks well from the inside. Its peers know better, and are asked on
the first connection of each link. Strangers are not served: only a node of the cluster has any address tried, others
the one they dial from, and all of it is bounded (:mod:`kvtransport.flow.probing`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from .address import parse_address, same_host
from .errors import AddressError, HandshakeError, KVError, ProtocolError, TlsError
from .flow.addresses import Addresses
from .flow.probing import Answer, ProbePolicy
from .io.tcp import address_of
from .wire.bodies import MAX_TEXT, Hello, clip

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .link import Link

VERB = "link.address"
PROBE_S = 3.0
"""To connect, shake hands and say HELLO: whoever takes longer is not reached."""
log = logging.getLogger("kvtransport")


async def who_answers(endpoint: Endpoint, address: str, *, timeout_s: float | None = None) -> Answer:
    """Dial ``address`` as others would, within :data:`PROBE_S` or ``timeout_s``, and hang up.

    Raises ConfigError where ``address`` is none, or may not be dialled.
    """
    from .dialling import Dialling

    timeout_s = PROBE_S if timeout_s is None else timeout_s
    host, port = parse_address(address)
    endpoint.check_dial(host)
    try:
        async with asyncio.timeout(timeout_s):
            link = await Dialling(endpoint, Addresses((host,)), port, 1, advertise=False).link()
    except TimeoutError:
        return Answer(f"nobody answered within {timeout_s:g} s")
    except TlsError as error:
        return Answer(error.message)
    except HandshakeError as error:
        # Refused: it speaks our protocol, and wants a proof that this side has not. Retryable: it said nothing to the purpose.
        return Answer(error.message if error.retryable else "")
    except ProtocolError as error:
        return Answer(f"no kvtransport port: {error.message}")
    except KVError as error:
        return Answer(error.message)
    answer = Answer(incarnation=link.peer_incarnation)
    await link.close()
    return answer


class AddressProbes:
    """One endpoint's: tries what its peers advertise, and tells them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._policy = ProbePolicy()
        self._running: dict[str, asyncio.Task[Answer | None]] = {}
        self._telling: set[asyncio.Task[None]] = set()

    def consider(self, link: Link, hello: Hello) -> None:
        """``link`` was made by a peer that was let in with ``hello``."""
        if hello.advertised is not None:
            task = self._loop.create_task(self._tell(link, *hello.advertised))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def close(self) -> None:
        tasks = {*self._telling, *self._running.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _tell(self, link: Link, address: str, incarnation: bytes) -> None:
        answer = await self._answer(link, address)
        if answer is not None:
            problem = clip(answer.verdict(incarnation), MAX_TEXT // 2)
            with contextlib.suppress(KVError):  # it has gone, or does not care
                await link.call(VERB, {"address": address, "problem": problem})

    async def _answer(self, link: Link, address: str) -> Answer | None:
        """None: not tried."""
        host, _ = parse_address(address)
        trusted = link.identity is not None and link.identity.node
        if not trusted and not same_host(host, address_of(link.peer)):
            return None
        known = self._policy.known(self._loop.time(), address)
        if known is not None:
            return known
        running = self._running.get(address)
        if running is None:
            if not self._policy.begin(self._loop.time()):
                return None
            running = self._running[address] = self._loop.create_task(self._probe(address))
        return await asyncio.shield(running)

    async def _probe(self, address: str) -> Answer | None:
        answer = None
        try:
            answer = await who_answers(self._endpoint, address)
        except KVError as error:
            log.debug("%s is not tried: %s", address, error)
        finally:
            del self._running[address]
            self._policy.end(self._loop.time(), address, answer)
        return answer


class Advertised:
    """What the peer of one link says of the address that this side advertises, if it advertises one."""

    def __init__(self, endpoint: Endpoint, link: Link) -> None:
        self._endpoint = endpoint
        self.address = endpoint.config.advertise if link.dialled else ""
        self.error: AddressError | None = None
        self._told: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def on_verdict(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        address, problem = args.get("address"), args.get("problem")
        if not isinstance(address, str) or not isinstance(problem, str):
            raise ProtocolError(f"{VERB}: address and problem are strings")
        if address != self.address or not address or self._told.done():
            return {}
        if problem:
            self.error = AddressError(
                f"{link.peer} cannot reach this process at {address}, the address it advertises "
                f"({clip(problem, MAX_TEXT // 2)}): advertise an address (host and port) that other machines can dial, "
                "and open the port in the firewall"
            )
            self._endpoint.unreachable(link, self.error)
        self._told.set_result(None)
        return {}

    @property
    def known(self) -> bool:
        """Whether the peer has said something."""
        return self._told.done()

    async def reachable(self, timeout_s: float) -> bool:
        """See :meth:`kvtransport.link.Link.reachable`."""
        if not self.address:
            return False
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for, which in Python 3.11 may swallow a cancellation
                await asyncio.shield(self._told)
        except TimeoutError:
            return False
        if self.error is not None:
            raise self.error
        return True
