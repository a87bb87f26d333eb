"""The scheduler's side: which requests send and receive, what each step makes ready, when blocks may be freed. No I/O.

The prefill engine stops one token short of the prompt and the decode engine computes that last token itself, for every
model: a recurrent state is only of use *before* the token that decode starts with (h(N-1)), a sliding window is laid out
for the token it is continued with, and prefill then computes exactly what one engine would have computed before its last prompt token.
What prefill samples is therefore not the request's first token; its answer is to be ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvtransport.errors import KVError

from .config import ConnectorConfig
from .groups import GroupRule
from .params import Rendezvous, read_params
from .steps import BlockRun, EndSend, ReceiveJob, Refusal, SendStep, Step

logger = logging.getLogger("vllm.kvtransport")

BACKOFF = 1
"""Tokens of the prompt that decode computes itself."""

BlockIds = tuple[Sequence[int], ...]


class EngineRequest(Protocol):
    """What is used of vllm.v1.request.Request."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    max_tokens: int
    prompt_token_ids: list[int] | None
    prompt_embeds: Any
    prompt_is_token_ids: list[bool] | None
    _all_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None


@dataclass(slots=True)
class _Send:
    request: EngineRequest
    meeting: Rendezvous
    boundary: int
    handed: int = 0
    """Tokens of which everything that travels was handed to the workers."""
    final: bool = False
    started: bool = False


@dataclass(slots=True)
class _Receive:
    meeting: Rendezvous
    boundary: int
    asked: bool = False
    """The workers were told to receive it (or to refuse it): it is never asked for again."""
    settled: bool = False


class SchedulerSide:
    """Belongs to the scheduler's thread. ``rules``: one per cache group of the engine.

    Nothing here raises for what a client sent: that would end the engine. A request with unusable parameters is computed
    as if it had none, with a warning, and says so in its answer (``kv_transfer_params.error``).
    """

    def __init__(self, config: ConnectorConfig, rules: Sequence[GroupRule], *, producer: bool, consumer: bool) -> None:
        self._config = config
        self._rules = tuple(rules)
        self._producer = producer
        self._consumer = consumer
        self._sends: dict[str, _Send] = {}
        self._receives: dict[str, _Receive] = {}
        self._errors: dict[str, str] = {}
        self._next = Step()

    @property
    def idle(self) -> bool:
        """Nothing is remembered of any request."""
        return not (self._sends or self._receives or self._errors)

    # -- a request comes -----------------------------------------------------------------------

    def on_new_request(self, request: EngineRequest) -> None:
        """Read its parameters; shorten the prompt of what decode will finish."""
        try:
            meeting = read_params(
                request.kv_transfer_params,
                dial=self._config.dial,
                producer=self._producer,
                consumer=self._consumer,
            )
        except KVError as error:
            logger.warning("request %s is computed without a transfer: %s", request.request_id, error)
            self._errors[request.request_id] = error.message
            return
        boundary = request.num_prompt_tokens - BACKOFF
        if meeting is None or boundary < 1:
            return
        if meeting.side == "receive":
            self._receives[request.request_id] = _Receive(meeting, boundary)
            return
        if request.prompt_token_ids is not None:
            del request.prompt_token_ids[boundary:]
        if request.prompt_embeds is not None:
            request.prompt_embeds = request.prompt_embeds[:boundary]
        if request.prompt_is_token_ids is not None:
            request.prompt_is_token_ids = request.prompt_is_token_ids[:boundary]
        del request._all_token_ids[boundary:]
        request.num_prompt_tokens = boundary
        request.max_tokens = 1
        self._sends[request.request_id] = _Send(request, meeting, boundary)

    # -- receiving -----------------------------------------------------------------------------

    def matched_tokens(self, request: EngineRequest, computed: int) -> tuple[int, bool]:
        """Tokens beyond the ``computed`` ones that will come from the other engine, and whether they come asynchronously."""
        receive = self._receives.get(request.request_id)
        if receive is None or receive.asked or receive.boundary <= computed:
            return 0, False
        return receive.boundary - computed, True

    def allocated(self, request: EngineRequest, ids: BlockIds, external: int) -> None:
        """vLLM chose: blocks for ``external`` tokens from outside (0: it will compute everything)."""
        receive = self._receives.get(request.request_id)
        if receive is None or receive.asked:
            return
        receive.asked = True
        if external <= 0:
            receive.settled = True
            self._refuse(
                receive, "decode computes this prompt itself (its own prefix cache covers it, or it may not use one)"
            )
            return
        runs = tuple(rule.whole(group, receive.boundary) for rule, group in zip(self._rules, ids, strict=True))
        self._next.receives.append(
            ReceiveJob(
                request.request_id,
                receive.meeting.transfer,
                receive.meeting.address,
                receive.boundary,
                receive.boundary - external,
                runs,
            )
        )

    def received(self, requests: Iterable[str]) -> None:
        """The workers said how these ended."""
        for request in requests:
            if (receive := self._receives.get(request)) is not None:
                receive.settled = True

    def _refuse(self, receive: _Receive, reason: str) -> None:
        self._next.refused.append(Refusal(receive.meeting.transfer, receive.meeting.address, reason))

    # -- each step -----------------------------------------------------------------------------

    def step(
        self,
        scheduled: Mapping[str, int],
        block_ids: Callable[[str], BlockIds | None],
        preempted: Iterable[str] = (),
    ) -> Step:
        """What the workers have to know of the step that computes ``scheduled`` (request -> tokens)."""
        step, self._next = self._next, Step()
        step.preempted = [request for request in preempted if request in self._sends]
        for request, tokens in scheduled.items():
            send = self._sends.get(request)
            if send is None or send.final:
                continue
            try:
                made = self._send(send, tokens, block_ids(request))
            except KVError as error:
                # Never expected; what matters is that the null block is not sent as if it were data.
                logger.error("request %s cannot be sent: %s", request, error)
                send.final = True
                step.ended.append(self._ended(request, send, error.message))
                continue
            if made is not None:
                step.sends.append(made)
        return step

    def _send(self, send: _Send, tokens: int, ids: BlockIds | None) -> SendStep | None:
        until = min(send.request.num_computed_tokens + tokens, send.boundary)
        # A request that was preempted computes again what was handed over before.
        if until <= send.handed or ids is None:
            return None
        runs: list[BlockRun | None] = [
            rule.ready(group, send.handed, until, send.boundary) for rule, group in zip(self._rules, ids, strict=True)
        ]
        send.handed = until
        send.final = until == send.boundary
        send.started = True
        meeting = send.meeting
        return SendStep(
            send.request.request_id, meeting.transfer, meeting.address, send.boundary, tuple(runs), send.final
        )

    @staticmethod
    def _ended(request: str, send: _Send, reason: str) -> EndSend:
        return EndSend(
            request if send.started else None, send.meeting.transfer, send.meeting.address, send.boundary, reason
        )

    # -- a request ends ------------------------------------------------------------------------

    def finished(self, request: EngineRequest, status: str) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks must stay until the workers name it, and what its answer says of the transfer."""
        rid = request.request_id
        if (error := self._errors.pop(rid, None)) is not None:
            return False, {"error": error}
        if (receive := self._receives.pop(rid, None)) is not None:
            if not receive.asked:
                self._refuse(receive, f"the request ended on decode before it was scheduled ({status})")
            elif not receive.settled:
                # vLLM keeps the blocks of a request that waits for its load; the workers name it when nothing writes any more.
                self._next.cancelled.append(rid)
            return False, None
        send = self._sends.pop(rid, None)
        if send is None:
            return False, None
        if not send.final:
            self._next.ended.append(self._ended(rid, send, f"the request ended on prefill ({status})"))
        return send.started, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": send.meeting.transfer.hex(),
            "remote_num_tokens": send.boundary,
        }
