"""What goes wrong while a cache travels: decode computes the prompt itself, the output is right, no block stays behind."""

from __future__ import annotations

import math
import time

import pytest

from .conftest import LENGTHS, Setup
from .relay import Relay
from .report import Report

TOKENS = LENGTHS[
    -1
]  # several prefill steps: the transfer is under way while most of the prompt is still to be computed
ALWAYS = 1 << 30


def check_right(hybrid: Setup, request: str) -> None:
    """Decode's answer is that of one engine alone."""
    result = hybrid.pair.decode.result(request)
    assert result.tokens == hybrid.expected[TOKENS].tokens
    assert result.logprobs == hybrid.expected[TOKENS].logprobs


def check_next_request(hybrid: Setup, request: str) -> None:
    """And the pair goes on: the next request is transferred, not computed twice."""
    transfer = hybrid.pair.submit(request, hybrid.prompt(TOKENS))
    hybrid.pair.prefill.result(request)
    check_right(hybrid, request)
    hybrid.pair.free_blocks()
    assert hybrid.pair.transfer("consumer", transfer)["end"] == "sealed"


def test_prefill_killed_in_the_middle(hybrid: Setup, report: Report) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    with Relay("127.0.0.1", pair.port) as relay:
        transfer = pair.submit("killed", hybrid.prompt(TOKENS), port=relay.port)
        relay.wait_payload(1)
        pair.prefill.kill()
        moved = relay.payload_bytes
        killed_s = time.monotonic()
        check_right(hybrid, "killed")
    assert pair.decode.wait_idle() == before[1]
    record = pair.transfer("consumer", transfer)
    assert record["end"] == "failed", record
    ended = pair.decode.result("killed").end_s - killed_s

    # A new process in its place: another incarnation, and decode was not restarted.
    pair.prefill.close()
    pair.prefill = pair.start_prefill().wait_ready()
    check_next_request(hybrid, "after-kill")
    assert pair.free_blocks() == before
    report.row(
        "prefill killed in the middle",
        f"after {moved / 1e6:.1f} MB; recomputed in {ended:.1f} s, right output, all blocks free; its successor is used",
    )


def test_decode_killed_in_the_middle(hybrid: Setup, report: Report) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    with Relay("127.0.0.1", pair.port) as relay:
        pair.submit("orphan", hybrid.prompt(TOKENS), port=relay.port)
        relay.wait_payload(1)
        pair.decode.kill()
        pair.prefill.result("orphan")
        assert pair.prefill.wait_idle() == before[0]
    pair.decode.close()
    pair.decode = pair.start_decode().wait_ready()
    check_next_request(hybrid, "after-decode-kill")
    assert pair.free_blocks() == before
    report.row("decode killed in the middle", "prefill's blocks free; its successor on the same port is used")


@pytest.mark.parametrize("damaged", [1, ALWAYS], ids=["one-chunk", "every-chunk"])
def test_corrupted_chunks(hybrid: Setup, report: Report, damaged: int) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    request = f"corrupt-{damaged}"
    with Relay("127.0.0.1", pair.port, flips=damaged) as relay:
        transfer = pair.submit(request, hybrid.prompt(TOKENS), port=relay.port)
        pair.prefill.result(request)
        check_right(hybrid, request)
        assert pair.free_blocks() == before
        assert relay.flipped == 1 if damaged == 1 else relay.flipped > 1
    record = pair.transfer("consumer", transfer)
    if damaged == 1:
        assert record["end"] == "sealed", record
        assert record["corrupt_chunks"] == 1, record
        report.row("one chunk damaged on the wire", "noticed, sent again, right output, all blocks free")
    else:
        assert record["end"] == "failed", record
        assert record["error"].startswith("integrity: "), record
        report.row("every chunk damaged on the wire", f"recomputed, right output, all blocks free: {record['error']}")


def test_prefill_frozen(hybrid: Setup, report: Report) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    with Relay("127.0.0.1", pair.port) as relay:
        transfer = pair.submit("frozen", hybrid.prompt(TOKENS), port=relay.port)
        relay.wait_payload(1)
        pair.prefill.freeze()
        frozen_s = time.monotonic()
        try:
            check_right(hybrid, "frozen")
            assert pair.decode.wait_idle() == before[1]
        finally:
            pair.prefill.thaw()
        ended = pair.decode.result("frozen").end_s - frozen_s
        pair.prefill.result("frozen")
        assert pair.free_blocks() == before
    record = pair.transfer("consumer", transfer)
    assert record["end"] == "failed", record
    check_next_request(hybrid, "after-freeze")
    assert pair.free_blocks() == before
    report.row(
        "prefill frozen (SIGSTOP) in the middle",
        f"recomputed, {ended:.1f} s after the freeze; right output, all blocks free; thawed it serves again",
    )


def test_nobody_sends(hybrid: Setup, report: Report) -> None:
    """Prefill never hears of the request: decode's receive deadline ends the wait."""
    pair = hybrid.pair
    with pair.with_decode(receive_deadline_s=2.0) as hurried:
        before = hurried.decode.wait_idle()
        submitted_s = time.monotonic()
        hurried.decode.add(
            "unsent", hybrid.prompt(TOKENS), params={"do_remote_prefill": True, "transfer_id": "00" * 15 + "01"}
        )
        result = hurried.decode.result("unsent")
        assert result.same_output(hybrid.expected[TOKENS])
        assert hurried.decode.wait_idle() == before
        waited = (result.first_s or math.inf) - submitted_s
    report.row("nobody sends", f"recomputed after the receive deadline of 2 s, first token after {waited:.1f} s")


def test_abort_on_decode(hybrid: Setup, report: Report) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    with Relay("127.0.0.1", pair.port) as relay:
        transfer = pair.submit("aborted", hybrid.prompt(TOKENS), port=relay.port)
        relay.wait_payload(1)
        pair.decode.abort("aborted")
        pair.prefill.result("aborted")
        assert pair.free_blocks() == before
    assert pair.transfer("consumer", transfer)["end"] != "sealed"
    assert not pair.decode.finished("aborted") or pair.decode.result("aborted").reason == "abort"
    # The same prompt again, computed by decode alone: nothing of the aborted transfer is in its way.
    pair.decode.add("alone", hybrid.prompt(TOKENS))
    check_right(hybrid, "alone")
    check_next_request(hybrid, "after-abort")
    assert pair.free_blocks() == before
    report.row(
        "request aborted on decode", "both sides' blocks free; computed by decode alone and transferred anew, right"
    )


def test_abort_on_prefill(hybrid: Setup, report: Report) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    with Relay("127.0.0.1", pair.port) as relay:
        transfer = pair.submit("given-up", hybrid.prompt(TOKENS), port=relay.port)
        relay.wait_payload(1)
        pair.prefill.abort("given-up")
        check_right(hybrid, "given-up")
        assert pair.free_blocks() == before
    assert pair.transfer("consumer", transfer)["end"] != "sealed"
    report.row("request aborted on prefill", "recomputed, right output, all blocks free")
