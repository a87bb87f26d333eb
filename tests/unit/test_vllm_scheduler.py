"""The scheduler's side of the vLLM connector: which blocks leave when, what is expected, when blocks may be freed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvpool.engines.vllm.config import ConnectorConfig
from kvpool.engines.vllm.groups import GroupRule
from kvpool.engines.vllm.scheduler import SchedulerSide
from kvpool.engines.vllm.steps import BlockRun, EndSend, ReceiveJob, Refusal, Step
from kvtransport.layout import GroupKind

ID = "00112233445566778899aabbccddeeff"
TRANSFER = bytes.fromhex(ID)
ADDRESS = ("10.0.0.2", 7000)
RULES = (
    GroupRule(GroupKind.RECURRENT, 4096),
    GroupRule(GroupKind.FULL, 16),
    GroupRule(GroupKind.SLIDING, 16, window=40),
)
TABLE = ((5,), tuple(range(10, 20)), (0, 0, 0, 0, 0, 0, 26, 27, 28, 29))
"""Block ids by group of a request of 150 tokens."""


@dataclass
class Request:
    """What the connector uses of vLLM's."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    max_tokens: int = 100
    prompt_token_ids: list[int] | None = None
    prompt_embeds: Any = None
    prompt_is_token_ids: list[bool] | None = None
    _all_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.prompt_embeds is None:
            self.prompt_token_ids = list(range(self.num_prompt_tokens))
        self._all_token_ids = list(range(self.num_prompt_tokens))


def sending(request: str = "p", tokens: int = 151, **more: Any) -> Request:
    params = {"do_remote_decode": True, "transfer_id": ID, "remote_host": ADDRESS[0], "remote_port": ADDRESS[1]}
    return Request(request, tokens, params, **more)


def receiving(request: str = "d", tokens: int = 151) -> Request:
    return Request(request, tokens, {"do_remote_prefill": True, "transfer_id": ID})


def prefill() -> SchedulerSide:
    return SchedulerSide(ConnectorConfig(), RULES, producer=True, consumer=False)


def decode() -> SchedulerSide:
    return SchedulerSide(ConnectorConfig(listen_port=7000), RULES, producer=False, consumer=True)


def table(ids: Any = TABLE) -> Callable[[str], Any]:
    return lambda request: ids


def compute(side: SchedulerSide, request: Request, tokens: int, preempted: tuple[str, ...] = ()) -> Step:
    """One step of ``tokens``, as vLLM counts them."""
    step = side.step({request.request_id: tokens}, table(), preempted)
    request.num_computed_tokens += tokens
    return step


# -- sending ---------------------------------------------------------------------------------


def test_prefill_computes_all_but_the_last_token_of_the_prompt_and_one_token_of_output():
    side, request = prefill(), sending()
    side.on_new_request(request)
    assert request.num_prompt_tokens == 150
    assert request.max_tokens == 1
    assert request.prompt_token_ids == request._all_token_ids == list(range(150))


def test_a_prompt_of_embeddings_is_shortened_too():
    side, request = prefill(), sending(prompt_embeds=list(range(151)), prompt_is_token_ids=[True] * 151)
    side.on_new_request(request)
    assert len(request.prompt_embeds) == len(request.prompt_is_token_ids) == len(request._all_token_ids) == 150


def test_blocks_leave_step_by_step_and_the_state_with_the_last():
    side, request = prefill(), sending()
    side.on_new_request(request)
    (first,) = compute(side, request, 100).sends
    assert (first.request, first.transfer, first.address, first.boundary, first.final) == (
        "p",
        TRANSFER,
        ADDRESS,
        150,
        False,
    )
    assert first.runs == (None, BlockRun(0, tuple(range(10, 16))), None)
    (last,) = compute(side, request, 50).sends
    assert last.final
    assert last.runs == (BlockRun(0, (5,)), BlockRun(6, (16, 17, 18, 19)), BlockRun(6, (26, 27, 28, 29)))
    assert compute(side, request, 1).sends == []
    assert side.finished(request, "FINISHED_LENGTH_CAPPED") == (
        True,
        {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": ID, "remote_num_tokens": 150},
    )
    assert side.idle


def test_what_prefill_had_in_its_prefix_cache_leaves_with_the_first_step():
    side, request = prefill(), sending()
    side.on_new_request(request)
    request.num_computed_tokens = 96
    (step,) = compute(side, request, 54).sends
    assert step.final
    assert step.runs[1] == BlockRun(0, TABLE[1])


def test_a_preempted_request_hands_nothing_over_twice():
    side, request = prefill(), sending()
    side.on_new_request(request)
    compute(side, request, 100)
    request.num_computed_tokens = 0
    step = side.step({}, table(), ["p", "someone else"])
    assert step.preempted == ["p"]
    assert compute(side, request, 64).sends == []
    (again,) = compute(side, request, 64).sends
    assert again.runs[1] == BlockRun(6, (16, 17))
    (last,) = compute(side, request, 22).sends
    assert last.runs[1] == BlockRun(8, (18, 19))
    assert last.final


def test_an_abort_in_the_middle_tells_the_consumer_and_keeps_the_blocks():
    side, request = prefill(), sending()
    side.on_new_request(request)
    compute(side, request, 100)
    keeps, _ = side.finished(request, "FINISHED_ABORTED")
    assert keeps
    assert side.step({}, table()).ended == [
        EndSend("p", TRANSFER, ADDRESS, 150, "the request ended on prefill (FINISHED_ABORTED)")
    ]
    assert side.idle


def test_an_abort_before_the_first_step_keeps_nothing():
    side, request = prefill(), sending()
    side.on_new_request(request)
    keeps, _ = side.finished(request, "FINISHED_ABORTED")
    assert not keeps
    (end,) = side.step({}, table()).ended
    assert end.request is None
    assert side.idle


def test_the_null_block_is_not_sent_as_if_it_were_data():
    side, request = prefill(), sending()
    side.on_new_request(request)
    holes = ((5,), (0, *TABLE[1][1:]), TABLE[2])
    step = side.step({"p": 150}, table(holes))
    assert step.sends == []
    (end,) = step.ended
    assert "blocks 0 to 10 of a full group are needed" in end.reason
    assert side.finished(request, "FINISHED_LENGTH_CAPPED")[0] is False
    assert side.step({}, table()).ended == []  # said once


def test_steps_of_other_requests_are_none_of_our_business():
    side, request = prefill(), Request("plain", 50)
    side.on_new_request(request)
    assert compute(side, request, 50) == Step()
    assert side.finished(request, "FINISHED_STOPPED") == (False, None)


# -- receiving -------------------------------------------------------------------------------


def test_decode_expects_everything_but_the_last_token():
    side, request = decode(), receiving()
    side.on_new_request(request)
    assert side.matched_tokens(request, 0) == (150, True)
    side.allocated(request, TABLE, 150)
    (job,) = side.step({}, table()).receives
    assert job == ReceiveJob(
        "d",
        TRANSFER,
        None,
        150,
        0,
        (BlockRun(0, (5,)), BlockRun(0, TABLE[1]), BlockRun(6, (26, 27, 28, 29))),
    )
    assert side.step({}, table()).receives == []
    side.received(["d", "unknown"])
    assert side.matched_tokens(request, 0) == (0, False)
    assert side.finished(request, "FINISHED_STOPPED") == (False, None)
    assert side.step({}, table()) == Step()
    assert side.idle


def test_what_decode_has_already_is_counted_but_named():
    side, request = decode(), receiving()
    side.on_new_request(request)
    assert side.matched_tokens(request, 96) == (54, True)
    side.allocated(request, TABLE, 54)
    (job,) = side.step({}, table()).receives
    assert (job.boundary, job.resident) == (150, 96)


@pytest.mark.parametrize("computed", [150, 144])
def test_a_prompt_that_decode_computes_itself_is_refused(computed):
    """Its own prefix cache covers everything, or vLLM may not use what comes: prefill must not wait for its deadline."""
    side, request = decode(), receiving()
    side.on_new_request(request)
    tokens, _ = side.matched_tokens(request, computed)
    assert tokens == 150 - computed
    side.allocated(request, TABLE, 0)
    (refusal,) = side.step({}, table()).refused
    assert (refusal.transfer, refusal.address) == (TRANSFER, None)
    side.allocated(request, TABLE, 0)
    assert side.step({}, table()).refused == []
    side.finished(request, "FINISHED_STOPPED")
    assert side.step({}, table()) == Step()


def test_after_a_failure_it_is_not_asked_for_again():
    side, request = decode(), receiving()
    side.on_new_request(request)
    side.allocated(request, TABLE, side.matched_tokens(request, 0)[0])
    side.step({}, table())
    side.received(["d"])
    assert side.matched_tokens(request, 0) == (0, False)
    side.allocated(request, TABLE, 0)
    assert side.step({"d": 151}, table()) == Step()


def test_an_abort_while_the_cache_comes_cancels_it():
    side, request = decode(), receiving()
    side.on_new_request(request)
    side.allocated(request, TABLE, 150)
    side.step({}, table())
    assert side.finished(request, "FINISHED_ABORTED") == (False, None)
    assert side.step({}, table()).cancelled == ["d"]
    assert side.idle


def test_an_abort_before_it_was_scheduled_refuses_it():
    side, request = decode(), receiving()
    side.on_new_request(request)
    side.finished(request, "FINISHED_ABORTED")
    assert side.step({}, table()).refused == [
        Refusal(TRANSFER, None, "the request ended on decode before it was scheduled (FINISHED_ABORTED)")
    ]
    assert side.idle


# -- requests that cannot be transferred -----------------------------------------------------


def test_unusable_parameters_do_not_end_the_engine_and_are_said_in_the_answer():
    side, request = prefill(), Request("p", 151, {"do_remote_decode": True, "transfer_id": "short"})
    side.on_new_request(request)
    assert request.num_prompt_tokens == 151
    assert compute(side, request, 151) == Step()
    keeps, answer = side.finished(request, "FINISHED_STOPPED")
    assert not keeps
    assert "transfer_id" in answer["error"]
    assert side.idle


@pytest.mark.parametrize("make", [sending, receiving])
def test_a_prompt_of_one_token_has_nothing_to_transfer(make):
    side = prefill() if make is sending else decode()
    request = make(tokens=1)
    side.on_new_request(request)
    assert request.num_prompt_tokens == 1
    assert side.matched_tokens(request, 0) == (0, False)
    assert compute(side, request, 1) == Step()
    assert side.finished(request, "FINISHED_STOPPED") == (False, None)
    assert side.idle
