"""Both sides of the vLLM connector over real sockets, driven as vLLM drives them, with toy engines (tests/vllmkit.py).

The same with real engines: make test-engines.
"""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from kvpool.engines.vllm.worker import Place
from kvtransport.errors import ConfigError, LayoutError
from tests.vllmkit import BLOCK_TOKENS, BLOCKS, PAGE, Pair, Toy, free_port, pair, toy_geometry, until

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TOKENS = 151
"""A prompt; 150 tokens are transferred: ten blocks, the last one not full."""


def transfer(both, name: str = "r", tokens: int = TOKENS, cuts: tuple[int, ...] = (64, 100), seed: int = 1) -> None:
    """One request through both engines; decode then holds what prefill computed."""
    send, receive = both.requests(name, tokens, seed=seed)
    both.decode.expect(receive)
    both.decode.step()
    both.prefill.add(send)
    both.prefill.allocate(send, send.num_prompt_tokens)
    both.compute(send, *cuts)
    both.decode.settle(name)
    assert name not in both.decode.failed
    both.decode.check_holds(receive, tokens - 1)


@pytest.mark.parametrize("dial", ["producer", "consumer"])
@pytest.mark.parametrize("tokens", [2, 17, 41, 145, 151, 161])
def test_decode_holds_what_prefill_computed(dial, tokens):
    with pair(dial) as both:
        cuts = tuple(c for c in (16, 50, 100, 144) if c < tokens - 1)
        transfer(both, tokens=tokens, cuts=cuts)
        both.done()


def test_blocks_of_others_are_not_touched():
    with pair() as both:
        before = both.decode.memory.copy()
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        mine = {i for ids in both.decode.tables["r"] for i in ids if i}
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.decode.settle("r")
        others = [i for i in range(BLOCKS) if i not in mine]
        regions = (both.decode.memory.reshape(3, BLOCKS, PAGE), before.reshape(3, BLOCKS, PAGE))
        assert np.array_equal(regions[0][:, others], regions[1][:, others])
        # And a state's padding is neither sent nor written.
        state = both.decode.tables["r"][0][0]
        assert (regions[0][:, state, 48:] == 0xEE).all()
        both.done()


@pytest.mark.parametrize("dial", ["producer", "consumer"])
def test_sixteen_requests_at_once(dial):
    lengths = [2, 16, 17, 18, 30, 33, 40, 41, 42, 64, 65, 70, 80, 100, 130, 150]
    with pair(dial, decode={"window_bytes": 65_536}) as both:
        sends = []
        for i, tokens in enumerate(lengths):
            send, receive = both.requests(f"r{i}", tokens, seed=i)
            both.decode.expect(receive)
            both.prefill.add(send)
            both.prefill.allocate(send, send.num_prompt_tokens)
            sends.append(send)
        both.decode.step()
        while left := [s for s in sends if s.num_computed_tokens < s.num_prompt_tokens]:
            both.prefill.step({s.request_id: min(20, s.num_prompt_tokens - s.num_computed_tokens) for s in left})
        for i, tokens in enumerate(lengths):
            both.prefill.finish(f"r{i}")
            both.decode.settle(f"r{i}")
            both.decode.check_holds(both.decode.requests[f"r{i}"], tokens - 1)
        assert not both.decode.failed
        both.done()


def test_a_prefix_that_decode_has_already_is_not_written_again():
    """Those blocks are shared with requests that are being decoded."""
    with pair() as both:
        send, receive = both.requests("r", TOKENS)
        resident = tuple(both.decode._take(6))
        for number in (1, 4):
            for block in resident:
                both.decode.write(number, block, b"\x77" * PAGE)
        both.decode.expect(receive, resident=resident)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send, 64)
        both.decode.settle("r")
        both.decode.check_holds(receive, 150, skip=6)
        assert all(both.decode.read(number, block) == b"\x77" * PAGE for number in (1, 4) for block in resident)
        assert both.decode.worker.statistics()["resident_bytes"] == 2 * 6 * PAGE
        both.done()


def test_nothing_waits_for_the_network_while_computing():
    """The peer is not there at all: every step goes on, and blocks are held until the deadline."""
    port = free_port()
    with Toy("producer", {"send_deadline_s": 1.5, "connect_deadline_s": 60}) as prefill:
        send, _ = Pair(prefill, prefill, "producer", port).requests("r", TOKENS)
        prefill.add(send)
        prefill.allocate(send, 150)
        begin = time.monotonic()
        Pair(prefill, prefill, "producer", port).compute(send, 50, 100)
        assert time.monotonic() - begin < 1.0
        assert "r" in prefill.kept
        until(prefill.idle, "blocks are free again")
        assert time.monotonic() - begin >= 1.4
        assert prefill.worker.statistics()["failed_sends"] == 1


def test_decode_may_come_late():
    """Prefill dials again until decode listens."""
    port = free_port()
    with Toy("producer", {}) as prefill:
        send, receive = Pair(prefill, prefill, "producer", port).requests("r", TOKENS)
        prefill.add(send)
        prefill.allocate(send, 150)
        Pair(prefill, prefill, "producer", port).compute(send, 50)
        with Toy("consumer", {"listen_port": port}) as decode:
            both = Pair(prefill, decode, "producer", port)
            decode.expect(receive)
            decode.settle("r")
            decode.check_holds(receive, 150)
            both.done()


# -- preemption ------------------------------------------------------------------------------


@pytest.mark.parametrize("reached", [True, False])
def test_a_preempted_requests_blocks_may_be_overwritten_at_once(reached):
    """What was handed over is copied aside before the next step writes; without a peer to copy for, the transfer ends."""
    with pair(prefill={"connect_deadline_s": 60}, decode={"receive_deadline_s": 15 if reached else 1}) as both:
        send, receive = both.requests("r", TOKENS)
        if not reached:
            send.kv_transfer_params["remote_port"] = free_port()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.prefill.step({"r": 100})
        if reached:
            outgoing = both.prefill.worker._transport._outgoing
            until(lambda: "r" in outgoing and outgoing["r"].sender, "the peer is reached")
        # Decode has not asked for it: without credit everything lies in vLLM's blocks.
        table = both.prefill.tables.pop("r")
        taken = [i for ids in table for i in ids if i]
        both.prefill.free |= set(taken)
        send.num_computed_tokens = 0
        both.prefill.step(preempted=("r",))
        for number in range(6):
            for block in taken:
                both.prefill.write(number, block, b"\xdd" * both.prefill.geometry.layers[number].pages.nbytes)
        both.prefill.allocate(send, 150)
        both.compute(send, 60, 120)
        both.decode.expect(receive)
        both.decode.settle("r")
        if reached:
            assert "r" not in both.decode.failed
            both.decode.check_holds(receive, 150)
        else:
            assert "r" in both.decode.failed
        both.done()


# -- what goes wrong -------------------------------------------------------------------------


def test_nobody_sends():
    with pair(decode={"receive_deadline_s": 0.3}) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.settle("r")
        assert both.decode.failed == {"r"}
        # Its producer may come after all: it is refused at once, and its blocks are free.
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        begin = time.monotonic()
        both.compute(send)
        both.done()
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("dial", ["producer", "consumer"])
def test_an_abort_on_decode_frees_prefill(dial):
    with pair(dial) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.prefill.step({"r": 64})
        both.decode.finish("r", "FINISHED_ABORTED")
        assert "r" in both.decode.kept  # until nothing writes there any more
        until(both.decode.idle, "decode's blocks are free")
        both.prefill.step({"r": 86})
        both.prefill.finish("r")
        both.done()
        assert both.decode.worker.statistics()["aborted"] == 1
        assert len(both.prefill.worker._transport._attached) == 0
        transfer(both, "next")
        both.done()


@pytest.mark.parametrize("dial", ["producer", "consumer"])
def test_an_abort_on_decode_before_it_was_scheduled_frees_prefill(dial):
    with pair(dial) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.add(receive)
        both.decode.finish("r", "FINISHED_ABORTED")
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.done()


@pytest.mark.parametrize("computed", [0, 64])
def test_an_abort_on_prefill_fails_decode_at_once(computed):
    with pair() as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        if computed:
            both.prefill.allocate(send, 150)
            both.prefill.step({"r": computed})
        begin = time.monotonic()
        both.prefill.finish("r", "FINISHED_ABORTED")
        both.prefill.step()
        both.decode.settle("r")
        assert time.monotonic() - begin < 5
        assert both.decode.failed == {"r"}
        both.done()


def test_a_decode_engine_that_restarts_is_used_again():
    with pair() as both:
        transfer(both, "before")
        both.done()
        old = both.decode
        old.worker.close()
        with Toy("consumer", {"listen_port": both.port}) as both.decode:
            transfer(both, "after")
            both.done()


def test_a_decode_engine_that_ends_in_the_middle_frees_prefill():
    with pair(prefill={"connect_deadline_s": 1}) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.prefill.step({"r": 64})
        both.decode.worker.close()
        both.prefill.step({"r": 86})
        both.prefill.finish("r")
        until(both.prefill.idle, "prefill's blocks are free")


def test_a_shorter_prompt_on_one_side_is_named():
    with pair() as both:
        send, _ = both.requests("r", TOKENS)
        _, receive = both.requests("r", TOKENS - 20)
        receive.kv_transfer_params["transfer_id"] = send.kv_transfer_params["transfer_id"]
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.decode.settle("r")
        assert both.decode.failed == {"r"}
        both.done()


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"vLLM": "0.31"}, "vLLM is '0.31' on prefill, '0.32' on decode"),
        ({"vLLM": "0.32", "tp_size": 2}, "the producer runs tensor parallelism 2, this side 1"),
    ],
)
def test_engines_that_do_not_fit_refuse_each_other_by_name(theirs, says, tmp_path):
    port = free_port()
    size = theirs.get("tp_size", 1)
    with (
        Toy(
            "consumer",
            {"listen_port": port, "debug_dir": str(tmp_path)},
            geometry=toy_geometry(vLLM="0.32"),
        ) as decode,
        Toy("producer", {}, geometry=toy_geometry(**theirs), place=Place(0, size)) as prefill,
    ):
        both = Pair(prefill, decode, "producer", port)
        send, receive = both.requests("r", TOKENS)
        decode.expect(receive)
        decode.step()
        prefill.add(send)
        prefill.allocate(send, 150)
        both.compute(send)
        decode.settle("r")
        assert decode.failed == {"r"}
        both.done()
    (record,) = map(json.loads, next(tmp_path.glob("transfers-consumer-*")).read_text().splitlines())
    assert says in record["error"]


def test_memory_to_stage_in_is_bounded():
    """The prefix that is here already needs 12 KiB aside; with less the transfer fails and everything is given back."""
    with pair(decode={"staging_bytes": 4_096}) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive, resident=tuple(both.decode._take(6)))
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.decode.settle("r")
        assert both.decode.failed == {"r"}
        assert both.decode.worker._memory.budget.used == 0
        both.done()


# -- ranks, settings, records ----------------------------------------------------------------


def test_ranks_pair_one_to_one():
    """Rank 1 listens on the port after rank 0's and is dialled by rank 1, wherever its data parallel engine listens."""
    port = free_port()
    with (
        Toy(
            "consumer", {"listen_port": port - 5}, geometry=toy_geometry(tp_size=2, tp_rank=1), place=Place(1, 2, 2)
        ) as decode,
        Toy("producer", {}, geometry=toy_geometry(tp_size=2, tp_rank=1), place=Place(1, 2, 0)) as prefill,
    ):
        assert decode.worker.listening == ("127.0.0.1", port)
        both = Pair(prefill, decode, "producer", port - 1)
        transfer(both)
        both.done()


def test_an_engine_that_cannot_listen_does_not_start():
    with pytest.raises(ConfigError, match="listen_port is required on the decode side"):
        Toy("consumer", {})
    with pair() as both, pytest.raises(ConfigError, match=str(both.port)):
        Toy("consumer", {"listen_port": both.port})
    with pytest.raises(ConfigError, match="beyond loopback"):
        Toy("consumer", {"listen_port": free_port(), "listen_host": "0.0.0.0"})


def test_a_wrong_token_is_refused():
    with pair(
        prefill={"token": "a wrong one of 16 bytes", "connect_deadline_s": 1},
        decode={"token": "the right one of 16 bytes", "receive_deadline_s": 1},
    ) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.decode.settle("r")
        assert both.decode.failed == {"r"}
        both.done()


def test_statistics_and_records_of_a_transfer(tmp_path):
    debug = {"debug_dir": str(tmp_path), "debug_hashes": True}
    with pair(prefill=debug, decode=debug) as both:
        transfer(both)
        both.done()
        until(lambda: list(tmp_path.glob("transfers-producer-*")), "records")
        sent, received = both.prefill.worker.statistics(), both.decode.worker.statistics()
        assert both.prefill.worker.statistics() is None
    total = 3 * 48 + 2 * 10 * PAGE + 4 * PAGE
    assert (sent["sent_transfers"], sent["sent_bytes"], sent["failed_sends"]) == (1, total, 0)
    assert (received["received_transfers"], received["received_bytes"]) == (1, total)
    assert len(sent["send_seconds"]) == len(received["wait_seconds"]) == 1

    def lines(kind: str, role: str) -> list[dict]:
        (path,) = tmp_path.glob(f"{kind}-{role}-0-*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def hashes(role: str) -> dict:
        return {(h["layer"], h["tensor"]): (h["hash"], h["bytes"]) for h in lines("hashes", role)}

    assert hashes("producer") == hashes("consumer")
    assert len(hashes("producer")) == 3 * 2 + 3
    (record,) = lines("transfers", "producer")
    assert (record["end"], record["tokens"], record["total_bytes"], len(record["steps"])) == ("sealed", 150, total, 3)
    assert all(layer["computed_s"] <= layer["acked_s"] for layer in record["layers"])


def test_dropping_the_state_on_purpose_drops_it():
    with pair(decode={"debug_drop_state": True}) as both:
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.decode.settle("r")
        state = both.decode.tables["r"][0][0]
        assert {both.decode.read(number, state) for number in (0, 2, 5)} == {bytes(48)}
        both.done()


# -- caches on a device ----------------------------------------------------------------------


class FakeStreams:
    """Device queues that run late: what a copy wrote is seen only after its event was asked for a few times.

    Until then the destination keeps the bytes it had, so that whoever reads early reads wrong ones. It records whether copies out
    were queued behind a mark of the computation.
    """

    def __init__(self, memory_of) -> None:
        self._memory_of = memory_of
        self._pinned: list = []
        self.unmarked = 0
        self.marks = 0

    def computed(self):
        self.marks += 1
        return self.marks

    def pinned(self, nbytes):
        import torch

        host = torch.full((nbytes,), 0x55, dtype=torch.uint8)
        self._pinned.append(host)
        return host

    def upload(self, values):
        return values

    def copying(self, after):
        streams = self

        class Copying:
            def __enter__(self):
                if after is None:
                    streams._target = streams._memory_of()
                else:
                    streams._target = streams._pinned[-1]
                streams._before = streams._target.clone()

            def __exit__(self, *exc):
                pass

        return Copying()

    def done(self):
        target, before = self._target, self._before
        changed = (target != before).nonzero().reshape(-1)
        late = target[changed].clone()
        target[changed] = before[changed]
        asked = 0

        def event() -> bool:
            nonlocal asked
            asked += 1
            if asked == 3:
                target[changed] = late
            return asked >= 3

        return event


@pytest.mark.torch
@pytest.mark.parametrize("tokens", [17, 151])
def test_caches_on_a_device_are_copied_behind_the_computation_and_before_the_wire(tokens):
    torch = pytest.importorskip("torch")
    toys: list[Toy] = []

    def streams():
        number = len(made)
        made.append(FakeStreams(lambda: torch.from_numpy(toys[number].memory)))
        return made[-1]

    made: list[FakeStreams] = []
    with pair(streams=streams) as both:
        toys += [both.decode, both.prefill]
        transfer(both, tokens=tokens, cuts=(16, 64, 100) if tokens > 100 else ())
        assert made[1].marks > 0
        both.done()
        for toy in toys:
            until(lambda toy=toy: toy.worker._memory.budget.used == 0, "staging memory is given back")


@pytest.mark.torch
def test_staging_that_is_used_up_ends_the_transfer_and_not_the_step():
    torch = pytest.importorskip("torch")
    toys: list[Toy] = []
    made: list[FakeStreams] = []

    def streams():
        number = len(made)
        made.append(FakeStreams(lambda: torch.from_numpy(toys[number].memory)))
        return made[-1]

    with pair(streams=streams, prefill={"staging_bytes": 6_000}) as both:
        toys += [both.decode, both.prefill]
        send, receive = both.requests("r", TOKENS)
        both.decode.expect(receive)
        both.decode.step()
        both.prefill.add(send)
        both.prefill.allocate(send, 150)
        both.compute(send)
        both.decode.settle("r")
        assert both.decode.failed == {"r"}
        both.done()
        until(lambda: both.prefill.worker._memory.budget.used == 0, "staging memory is given back")


def test_a_layout_that_scatters_a_block_over_a_device_is_refused_at_the_start():
    from kvpool.engines.vllm.geometry import Geometry, LayerCache, attention_tensors
    from kvpool.engines.vllm.groups import GroupRule
    from kvpool.engines.vllm.pages import page_shape
    from kvtransport.layout import GroupKind

    torch = pytest.importorskip("torch")
    rule = GroupRule(GroupKind.FULL, BLOCK_TOKENS)
    pages = page_shape((4, 2, 16, 8), (128, 512, 8, 1), 2, 0, 4)
    layer = LayerCache("layers.0.attn", 0, rule, pages, attention_tensors(pages, 16, "bfloat16"))
    with pytest.raises(LayoutError, match="VLLM_KV_CACHE_LAYOUT"):
        Toy("producer", {}, geometry=Geometry("m", "", [layer], (rule,)), streams=FakeStreams(lambda: torch.zeros(1)))


def test_no_thread_is_left():
    before = set(threading.enumerate())  # other tests may have used the process's own loop, which stays
    with pair() as both:
        transfer(both)
        both.done()
        assert any(t.name == "kvtransport-loop" for t in set(threading.enumerate()) - before)
    until(
        lambda: not any(t.name == "kvtransport-loop" for t in set(threading.enumerate()) - before),
        "loops end",
    )
