"""``kvpool demo --real``: real models through real processes, bit by bit; and every damage is noticed."""

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kvpool.cli import app
from kvpool.demo import real_roles
from kvpool.demo.real import RealOptions, pool_bytes
from kvpool.demo.real_flipper import Flip, Flipper, FlippingRelay
from kvpool.demo.real_report import INTO_POOL, OUT_OF_POOL, Outcome, report
from kvpool.engines import tiny_models
from kvpool.engines.transformers import layout_of
from kvtransport.errors import ConfigError, TransferError
from kvtransport.wire.frames import FrameType, data_seed, encode_control, pack_header, payload_checksum, seal_header
from kvtransport.wire.reader import FrameReader

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
QUICK = ["--tokens", "200", "--steps", "4"]

# -- as a command ------------------------------------------------------------------------------------


@contextmanager
def running(tmp_path, *arguments, **environment):
    """The command, with temporary files in a place of its own that must be empty again afterwards."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # torch makes a folder for its compiler, used or not.
    environment |= {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")}
    demo = subprocess.Popen(
        [sys.executable, "-m", "kvpool.cli", "demo", "--real", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield demo
    finally:
        demo.kill()
        demo.communicate()
    assert not leftovers(scratch)
    assert not list(scratch.iterdir())


def leftovers(scratch):
    """Processes that inherited the environment of a demo."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(scratch):
                found.append(process)
        except psutil.Error:
            continue
    return found


def run(tmp_path, *arguments, status=0, **environment):
    """(the JSON report, what people were told)"""
    with running(tmp_path, *arguments, "--json", "-", **environment) as demo:
        out, err = demo.communicate(timeout=100)
    assert demo.returncode == status, err
    return json.loads(out), err


def test_kimi_linear_is_bitwise_equal_and_resumes_from_the_pool(tmp_path):
    body, err = run(tmp_path, "--model", "kimi_linear")
    assert body["ok"] is body["bitwise_equal"] is True
    assert body["problems"] == body["flips"] == []
    assert body["architecture"] == "KimiLinearForCausalLM"
    assert body["prefix_hit_tokens"] == 512
    assert body["tokens_generated"] == 32
    assert "bitwise equal to runs without transfer" in err
    layout = layout_of(tiny_models.tiny_config("kimi_linear"))
    first, second = body["requests"]
    assert [first["prefix_hit_tokens"], second["prefix_hit_tokens"]] == [0, 512]
    assert [first["tokens"], second["tokens"]] == [777, 644]
    assert first["prefill_cuts"] == [*range(128, 777, 128), 777]
    assert second["prefill_cuts"] == [640, 644]
    state = layout.group_bytes(1)["recurrent"]
    for row in (first, second):
        assert row["logits_sha256"] == row["reference_logits_sha256"]
        assert row["generated"] == row["reference_generated"]
        assert len(row["logits_sha256"]) == len(row["generated"]) == 17
        assert len(set(row["generated"])) > 4  # a model that repeats itself would prove little
        assert row["bytes_by_group"]["received"] == layout.group_bytes(row["tokens"])
        assert row["corrupt_chunks"] == row["resent_bytes"] == 0
        assert [times["layer"] for times in row["layers"]] == list(layout.layers)
        for times in row["layers"]:
            assert times["first_byte_s"] <= times["applied_s"] <= times["consumed_s"]
            assert times["ready_s"] <= times["applied_s"]
    # What the pool had was fetched, and neither computed nor sent again.
    token = layout.group_bytes(1)["full"]
    assert first["bytes_by_group"]["sent"] == {"full": 777 * token, "recurrent": 2 * state}
    assert first["bytes_by_group"]["prefix_fetched"] == {}
    assert second["bytes_by_group"]["prefix_fetched"] == {"full": 512 * token, "recurrent": state}
    assert second["bytes_by_group"]["sent"] == {"full": 132 * token, "recurrent": state}
    # Two tensors of one layer in seven chunks, two states of three layers at two positions.
    assert first["checksums_verified"] == {"pool": 7 * 2 + 2 * 6, "prefill": 0, "decode": 7 * 2 + 6}
    assert body["checksums_verified"] == sum(sum(row["checksums_verified"].values()) for row in (first, second))


def test_a_model_in_a_folder_is_bitwise_equal(tmp_path):
    folder = tiny_models.save_tiny("falcon_h1", tmp_path / "model", seed=3)
    body, _ = run(tmp_path, "--model", str(folder), "--seed", "5", "--connections", "1")
    assert body["bitwise_equal"] is True
    assert body["architecture"] == "FalconH1ForCausalLM"
    assert body["prefix_hit_tokens"] == 512
    assert set(body["bytes_by_group"]) == {"full", "recurrent"}


def test_a_state_zeroed_on_arrival_is_seen_in_the_output(tmp_path):
    body, err = run(tmp_path, *QUICK, "--corrupt", "zero-state", status=1)
    assert body["ok"] is body["bitwise_equal"] is False
    for number, row in enumerate(body["requests"], 1):
        assert row["zeroed"] == [{"layer": 0, "tensor": 0}, {"layer": 0, "tensor": 1}]
        # Prefill was right, the decode is not; the checksums held, so nothing but the output could tell.
        assert row["first_difference"] >= 1
        assert row["corrupt_chunks"] == row["resent_bytes"] == 0
        assert any(f"request {number}: the logits of decode step" in problem for problem in body["problems"])
    assert "not equal to runs without transfer" in err


def test_a_byte_flipped_on_each_wire_is_caught_and_sent_again(tmp_path):
    body, err = run(tmp_path, *QUICK, "--corrupt", "flip-byte")
    assert body["ok"] is body["bitwise_equal"] is True
    assert [flip["wire"] for flip in body["flips"]] == [INTO_POOL, OUT_OF_POOL]
    first = body["requests"][0]
    assert first["corrupt_chunks"] == 1
    assert first["resent_bytes"] > 0
    assert err.count("caught by its checksum") == 2


def test_a_wire_that_always_changes_bytes_fails_the_transfer_by_name(tmp_path):
    body, err = run(tmp_path, *QUICK, "--corrupt", "flip-always", status=1)
    assert body["ok"] is body["bitwise_equal"] is False
    assert body["error"]["code"] == "integrity"
    assert "checksum failed 2 times; something on the path changes bytes" in body["error"]["message"]
    assert "kvpool demo: integrity error: " in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path, number, status):
    with running(tmp_path) as demo:
        assert "starting prefill" in demo.stdout.readline()
        demo.send_signal(number)
        demo.communicate(timeout=20)
        assert demo.returncode == status


def test_without_torch_the_extra_is_named(tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("raise ImportError('no torch in this test')")
    body, err = run(tmp_path, status=1, PYTHONPATH=str(fake))
    assert body["error"]["code"] == "config"
    assert "no torch in this test" in err
    assert "pip install 'kvtransport[engines]'" in err


@pytest.mark.parametrize("config", ['{"model_type": "abacus"}', "{", '{"model_type": "lfm2"}'])
def test_a_folder_without_a_usable_model_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert RealOptions(model=str(tmp_path)).directory == tmp_path
    with pytest.raises(ConfigError, match=f"{tmp_path} is not a causal language model that transformers can load"):
        real_roles.load(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--real", "--model", "gpt2"], "no model 'gpt2': name one of qwen3_next"),
        (["--real", "--tokens", "65"], "prompts of 66 to 4080 tokens can be run"),
        (["--real", "--tokens", "4081"], "got --tokens 4081"),
        (["--real", "--steps", "0"], "at least 1 step must be decoded, got --steps 0"),
        (["--real", "--prefix-tokens", "500"], "must be a multiple of 64 tokens"),
        (["--real", "--tokens", "129", "--prefix-tokens", "128"], "before the last but one of 129"),
        (["--real", "--connections", "65"], "1 to 64 connections"),
        (["--real", "--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--real", "--direct"], "--direct means nothing with --real"),
        (["--real", "--layer-ms", "5"], "--layer-ms means nothing with --real"),
        (["--model", "gemma3"], "--model needs --real"),
        (["--corrupt", "zero-state"], "--corrupt needs --real"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(arguments, said):
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


# -- the verdict -------------------------------------------------------------------------------------


def outcome(*, hit=128, flips=None, logits="abc", resent=0, corrupt=0):
    """Two requests as the processes would tell them; the reference's logits are a, b, c."""
    found = Outcome(RealOptions(tokens=200), "Arch", "f" * 64, ["full"], [200, 164], flips or {})
    for matched in (0, hit):
        prefilled = {
            "logits_sha256": logits[0], "matched": matched, "started_s": 1.0, "computing_s": 1.5, "computed_s": 2.0,
            "fetched": {"bytes_by_group": {"full": 1}, "checksums_verified": 1} if matched else None,
            "bytes_by_group": {"full": 10}, "chunks": 3, "resent_bytes": resent, "cuts": [200],
            "layers": {"0": {"ready_s": 1.75}},
        }  # fmt: skip
        times = {"first_byte_s": 1.5, "applied_s": 1.875, "consumed_s": 2.125}
        received = {
            "bytes_by_group": {"full": 20}, "checksums_verified": 4, "corrupt_chunks": corrupt, "zeroed": [],
            "sealed_s": 2.25, "layers": {"0": times},
        }  # fmt: skip
        generated = {"logits_sha256": list(logits[1:]), "tokens": [7, 8, 9], "decode_s": 0.5}
        found.add(prefilled, received, generated, {"logits_sha256": list("abc"), "tokens": [7, 8, 9]})
    return report(found, 9.0)


def test_a_right_run_is_reported_as_one():
    body = outcome()
    assert body["ok"] is body["bitwise_equal"] is True
    assert body["bytes_by_group"] == {"full": 40}
    assert body["checksums_verified"] == (3 + 4) + (3 + 4 + 1)
    assert body["requests"][0]["layers"] == [
        {"layer": 0, "ready_s": 0.75, "first_byte_s": 0.5, "applied_s": 0.875, "consumed_s": 1.125}
    ]
    json.dumps(body, allow_nan=False)


@pytest.mark.parametrize(
    ("logits", "said"),
    [("xbc", "the prefill's logits differ"), ("abx", "decode step 2 differ"), ("axx", "step 1 differ")],
)
def test_one_different_logit_is_enough(logits, said):
    body = outcome(logits=logits)
    assert body["ok"] is body["bitwise_equal"] is False
    assert len(body["problems"]) == 2
    assert all(said in problem for problem in body["problems"])


@pytest.mark.parametrize("hit", [0, 64])
def test_right_logits_without_the_reuse_are_not_right(hit):
    body = outcome(hit=hit)
    assert body["bitwise_equal"] is True
    assert body["ok"] is False
    assert body["problems"] == [f"request 2: resumed at {hit} tokens, the pool should have offered 128"]


def test_a_flipped_byte_that_no_checksum_noticed_is_not_right():
    flips = {INTO_POOL: [Flip(3, 0, 0, 5, 0)], OUT_OF_POOL: [Flip(3, 1, 64, 5, 0)]}
    assert outcome(flips=flips, resent=64, corrupt=1)["ok"] is True
    body = outcome(flips=flips)  # though the output is right: one byte of a state may change no logit
    assert body["bitwise_equal"] is True
    assert body["ok"] is False
    assert [wire in problem for wire, problem in zip(flips, body["problems"], strict=True)] == [True, True]
    assert "did not take place" in outcome(flips={INTO_POOL: []})["problems"][0]


# -- the parts ---------------------------------------------------------------------------------------


def data_frame(payload, **fields):
    head = pack_header(FrameType.DATA, transfer=b"t" * 16, length=len(payload), **fields)
    return seal_header(head, payload_checksum(payload, data_seed(head))) + payload


def test_one_bit_of_one_chunk_changes_however_the_stream_is_cut():
    payloads = [bytes(range(100)), b"\xff", bytes(1000)]
    stream = encode_control(FrameType.PING) + b"".join(
        data_frame(payload, offset=i << 20, layer=i) for i, payload in enumerate(payloads)
    )
    rng = random.Random(7)
    for wanted, layer in itertools.product(range(3), range(40)):
        flips = []
        flipper = Flipper(lambda header, wanted=wanted: header.layer == wanted, flips.append)
        cuts = sorted({0, len(stream), *(rng.randrange(len(stream)) for _ in range(layer))})
        out = b"".join(flipper.feed(stream[a:b]) for a, b in itertools.pairwise(cuts))
        assert sum((a ^ b).bit_count() for a, b in zip(stream, out, strict=True)) == 1
        assert flips == [Flip(wanted, 0, wanted << 20, len(payloads[wanted]) // 2, 0)]
        frames = FrameReader().feed(out)
        assert [frame.error is not None for frame in frames[1:]] == [i == wanted for i in range(3)]


def test_what_is_no_stream_of_frames_passes_unchanged():
    flips = []
    flipper = Flipper(lambda header: True, flips.append)
    text = b"GET / HTTP/1.1\r\n" * 40
    assert flipper.feed(text) + flipper.feed(data_frame(b"abc")) == text + data_frame(b"abc")
    assert flips == []


async def test_the_relay_damages_one_direction_once_and_closes_with_its_ends():
    async def echo(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    frame = data_frame(bytes(300))
    async with FlippingRelay(*server.sockets[0].getsockname()[:2], upstream=False, always=False) as relay:
        for number in range(2):
            reader, writer = await asyncio.open_connection(*relay.address)
            writer.write(frame)
            got = await reader.readexactly(len(frame))
            assert (got == frame) is (number == 1)
            writer.close()
            await writer.wait_closed()
        assert relay.flips == [Flip(0, 0, 0, 150, 0)]
        server.close()
        address = relay.address
        reader, writer = await asyncio.open_connection(*address)  # nobody is behind it any more
        assert await reader.read() == b""
        writer.close()
    with pytest.raises(OSError):
        await asyncio.open_connection(*address)
    await server.wait_closed()


class SlowTransfer:
    """Takes units and releases none by itself; fails when told to."""

    def __init__(self):
        self.handovers = []
        self.failed = False

    def ready(self, layer, tensor, pages, *, first, tokens):
        if self.failed:
            raise TransferError("the link is down")
        self.handovers.append(SlowHandover())
        return self.handovers[-1]


class SlowHandover:
    def __init__(self):
        self.free = asyncio.Event()

    @property
    def done(self):
        return self.free.is_set()

    async def released(self):
        await self.free.wait()


async def test_the_model_waits_while_too_much_is_held_and_hears_of_a_failure(monkeypatch):
    monkeypatch.setattr(real_roles, "MAX_HELD_BYTES", 100)
    transfer = SlowTransfer()
    stream = real_roles.UnitStream(transfer)

    def hand_over():
        stream(0, 0, memoryview(bytearray(40)), 0, 1)

    await asyncio.to_thread(hand_over)
    await asyncio.to_thread(hand_over)
    third = asyncio.create_task(asyncio.to_thread(hand_over))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(transfer.handovers) == 2
    transfer.handovers[0].free.set()
    await third
    assert len(transfer.handovers) == 3
    transfer.failed = True
    for handover in transfer.handovers:
        handover.free.set()
    with pytest.raises(TransferError, match="the link is down"):
        await asyncio.to_thread(hand_over)


@pytest.mark.parametrize("name", ["kimi_linear", "gemma3", "falcon_h1"])
def test_defaults_of_the_demo_fit_the_pool(name):
    layout = layout_of(tiny_models.tiny_config(name))
    prompts = RealOptions(model=name).prompts(tiny_models.VOCABULARY)
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == [777, 644]
    assert prompts[0][:512] == prompts[1][:512]
    assert prompts[0][512:] != prompts[1][512:]
    assert pool_bytes(layout, lengths) == 64 << 20
    assert pool_bytes(layout, [100_000, 90_000]) > 2 * (layout.bytes_at(100_000) + layout.bytes_at(90_000))
