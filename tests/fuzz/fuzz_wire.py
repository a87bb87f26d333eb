"""Fuzz target of the wire parser: no input may do anything but give frames or a KVError.

    python tests/fuzz/fuzz_wire.py --seconds 60 [CORPUS]

Without atheris it mutates the golden vectors (and the files in CORPUS), seeded, and repairs checks and checksums of
most inputs so that the mutations reach the code behind them. With atheris installed, ``--atheris`` uses its
coverage-guided loop over the same target; further arguments go to libFuzzer. An input that breaks a promise is written to
``crash-<hash>.bin`` in the corpus folder (or the current one), its hex is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from kvtransport.errors import KVError  # noqa: E402
from kvtransport.wire.frames import (  # noqa: E402
    HEADER_BYTES,
    NO_TRANSFER,
    Flag,
    Frame,
    FrameType,
    Limits,
    check_payload,
    decode_control,
    encode_control,
    pack_header,
    unpack_header,
)
from kvtransport.wire.reader import FrameReader  # noqa: E402
from kvtransport.wire.state import (  # noqa: E402
    ConnectionMachine,
    Role,
    TransferEvent,
    TransferMachine,
    TransferRole,
)

GOLDEN = [
    bytes.fromhex(vector["hex"])
    for vector in json.loads((ROOT / "tests" / "wire" / "golden.json").read_text()).values()
]
CORPUS = Path(__file__).parent / "corpus" / "wire"
LIMITS = Limits(data=1 << 16)


# ------------------------------------------------------------------------------------------ the target


def parse(pieces: list[bytes]) -> tuple[list[Frame], KVError | None]:
    reader = FrameReader(LIMITS)
    frames: list[Frame] = []
    try:
        for piece in pieces:
            frames += reader.feed(piece)
            assert reader.buffered <= HEADER_BYTES + LIMITS.largest(), "the reader holds more than a frame"
        reader.close()
    except KVError as exc:
        return frames, exc
    return frames, None


def run_one(data: bytes) -> int:
    """Hold one input to every promise; returns the number of frames in it. Any exception is a finding."""
    frames, error = parse([data])
    cut = hashlib.blake2b(data, digest_size=4).digest()
    at = int.from_bytes(cut, "little") % (len(data) + 1)
    again, other = parse([data[:at], data[at : at + 1], data[at + 1 :]])
    assert [f[:2] for f in again] == [f[:2] for f in frames], "frames depend on how the stream was cut"
    assert type(other) is type(error), "the error depends on how the stream was cut"
    where = 0
    for frame in frames:
        header = frame.header
        raw = data[where : where + HEADER_BYTES]
        assert unpack_header(raw, LIMITS) == header
        fields = {k: v for k, v in header._asdict().items() if k not in ("type", "check")}
        assert pack_header(header.type, **fields) == raw, "a header does not pack to the bytes it came from"
        where += HEADER_BYTES + header.length
        if frame.error is None:
            assert len(frame.payload) == header.length
            check_payload(header, frame.payload)
            if not header.flags & Flag.NO_CHECKSUM:
                assert xxhash.xxh3_64_intdigest(frame.payload, header.check) == header.checksum
            if header.type is not FrameType.DATA:
                hold_body(frame)
    hold_machines(frames)
    return len(frames)


def hold_body(frame: Frame) -> None:
    header = frame.header
    try:
        body = decode_control(header, frame.payload, verified=True)
    except KVError:
        return
    repr(body)
    scope = {"transfer": header.transfer, "offset": header.offset, "flags": header.flags}
    raw = encode_control(header.type, body, **scope)
    back = decode_control(unpack_header(raw[:HEADER_BYTES]), raw[HEADER_BYTES:])
    # NaN in a CALL is legal and not equal to itself: compare what travels.
    assert encode_control(header.type, back, **scope) == raw, "a body does not survive its own encoding"


def hold_machines(frames: list[Frame]) -> None:
    for role in Role:
        connection = ConnectionMachine(role, incarnation=b"A" * 16)
        if role is Role.DIAL:
            connection.hello_to_send(link=b"L" * 16)
        transfers = [TransferMachine(r) for r in TransferRole]
        for frame in frames:
            try:
                connection.receive(frame.header)
                if frame.header.type is FrameType.HELLO:
                    connection.receive_hello(decode_control(frame.header, frame.payload))
                    if role is Role.ACCEPT:
                        connection.hello_to_send(link=connection.peer.link if connection.peer else NO_TRANSFER)
            except KVError:
                break
            for transfer in transfers:
                state = transfer.state
                try:
                    transfer.fire(TransferEvent.received(frame.header))
                except KVError:
                    assert transfer.state is state, "a refused event moved the state"


# ------------------------------------------------------------------------------------------ the mutator


def split(data: bytes) -> list[bytearray]:
    """Frames of a (probably damaged) input, as far as its lengths make sense."""
    frames = []
    while len(data) >= HEADER_BYTES:
        size = HEADER_BYTES + min(int.from_bytes(data[28:32], "little"), 1 << 17)
        frames.append(bytearray(data[:size]))
        data = data[size:]
    return [*frames, bytearray(data)] if data else frames


def repair(frame: bytearray) -> None:
    """Make length, check and checksum of a frame good, so that what was changed is what is tested."""
    if len(frame) < HEADER_BYTES:
        return
    frame[28:32] = (len(frame) - HEADER_BYTES).to_bytes(4, "little")
    check = xxhash.xxh3_64_intdigest(bytes(frame[:48]))
    frame[56:64] = check.to_bytes(8, "little")
    plain = frame[5] == FrameType.DATA and frame[6] & Flag.NO_CHECKSUM
    frame[48:56] = bytes(8) if plain else xxhash.xxh3_64_intdigest(bytes(frame[64:]), check).to_bytes(8, "little")


def change(rng: random.Random, frame: bytearray) -> None:
    """One small damage anywhere in ``frame``."""
    size = len(frame)
    at = rng.randrange(size)
    match rng.randrange(7):
        case 0:
            frame[at] ^= 1 << rng.randrange(8)
        case 1:
            # msgpack's container, extension and length bytes, and the edges of integers
            frame[at] = rng.choice(
                b"\x00\x01\x7f\x80\x81\x8f\x90\x91\x9f\xc0\xc1\xc4\xc6\xc7\xcb\xcf\xd3\xd9\xdb\xdc\xdd\xdf\xff"
            )
        case 2:
            frame[at : at + rng.choice((1, 2, 4, 8))] = rng.choice((0, 1, 2**15, 2**16 - 1)).to_bytes(
                2, "little"
            ) * rng.choice((1, 2, 4))
        case 3:
            del frame[at : at + rng.randrange(1, 16)]
        case 4:
            frame[at:at] = rng.randbytes(rng.randrange(1, 16))
        case 5:
            frame[at:at] = frame[at : at + rng.randrange(1, 64)] * rng.randrange(1, 8)
        case 6:
            frame[4 + rng.randrange(min(44, max(size - 4, 1))) : at] = b""


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    frames = [f for _ in range(rng.randrange(1, 4)) for f in split(rng.choice(seeds))]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        frame = rng.choice(frames)
        if frame:
            change(rng, frame)
            if rng.random() < 0.8:
                repair(frame)
    if rng.random() < 0.2:
        rng.shuffle(frames)
    data = b"".join(frames)
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data


def fuzz(seeds: list[bytes], *, seed: int, go_on: Callable[[int], bool]) -> Iterator[tuple[bytes, Exception | None]]:
    """Run inputs until ``go_on(done)`` says no; yields each with what it broke, None for nothing."""
    rng = random.Random(seed)
    done = 0
    while go_on(done):
        data = seeds[done] if done < len(seeds) else mutate(rng, seeds)
        try:
            run_one(data)
        except Exception as exc:  # noqa: BLE001  (any exception is what a fuzzer looks for)
            yield data, exc
        else:
            yield data, None
        done += 1


def load(folder: Path | None) -> list[bytes]:
    files = [p for f in (CORPUS, folder) if f for p in sorted(f.glob("*.bin"))]
    return GOLDEN + [p.read_bytes() for p in files]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="fuzz the wire parser")
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; further arguments go to libFuzzer")
    args, rest = parser.parse_known_args(argv)
    if args.atheris:
        import atheris

        atheris.instrument_all()
        folders = [str(p) for p in (args.corpus, CORPUS) if p]
        atheris.Setup([sys.argv[0], f"-max_total_time={args.seconds:.0f}", *rest, *folders], run_one)
        atheris.Fuzz()
        return 0
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    end = time.monotonic() + args.seconds
    count = findings = 0
    for data, exc in fuzz(load(args.corpus), seed=args.seed, go_on=lambda _: time.monotonic() < end):
        count += 1
        if exc is not None:
            findings += 1
            path = (args.corpus or Path()) / f"crash-{hashlib.sha256(data).hexdigest()[:16]}.bin"
            path.write_bytes(data)
            print(f"{type(exc).__name__}: {exc}\n  {path}: {data.hex()}", file=sys.stderr)
            if findings == 10:
                break
    print(f"{count} inputs, {findings} findings, seed {args.seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
