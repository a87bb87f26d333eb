"""Coverage-guided fuzzing of what a peer can say to Python code, with atheris (libFuzzer underneath).

``python tests/fuzz/targets.py TARGET [libFuzzer arguments] [CORPUS...]``; ``make fuzz`` runs all of them. A target returns, or an
invariant does not hold: any exception that is no KVError is a finding.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import atheris
import msgspec

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# The package, but for what is full of arrays: instrumented comparisons of numpy's lose memory, some 400 bytes an execution.
with atheris.instrument_imports(include=["kvtransport"], exclude=["kvtransport.buffers"]):
    from kvtransport import _pure
    from kvtransport.address import parse_address, same_host
    from kvtransport.buffers import PageList
    from kvtransport.compression import BF16_PLANES, HEADER, Codec, decode, encode, raw_bytes
    from kvtransport.errors import Fault, IntegrityError, KVError
    from kvtransport.identity import Token, TokenStore
    from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec
    from kvtransport.manifest import Manifest
    from kvtransport.wire import bodies
    from kvtransport.wire.frames import FrameType, Header, decode_control, encode_control, unpack_header
    from kvtransport.wire.state import ConnectionMachine, ConnectionState, Role


def _wire() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_wire", Path(__file__).with_name("fuzz_wire.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WIRE = _wire()
LAYOUT = CacheLayout(
    "fuzz",
    (
        CacheGroup("linear", GroupKind.RECURRENT, (0,), (TensorSpec("state", "float32", (2, 4)),)),
        CacheGroup("full", GroupKind.FULL, (1,), (TensorSpec("kv", "bfloat16", (8,)),)),
    ),
)


TOKEN = Token("fuzz", b"0123456789abcdef", "tenant")
TOKENS = TokenStore([TOKEN])


def frames(data: bytes) -> None:
    """A stream of bytes into the frame parser and both state machines; checks are repaired, or nothing would get past them."""
    raw = data[1:]
    if data[:1] != b"\0":
        parts = WIRE.split(raw)
        for part in parts:
            WIRE.repair(part)
        raw = b"".join(parts)
    WIRE.run_one(raw)


def control(data: bytes) -> None:
    """A body of every type that has one: decoded, or a KVError; what is decoded survives its own encoding."""
    if not data:
        return
    kinds = [t for t in FrameType if t not in (FrameType.DATA, FrameType.CREDIT, FrameType.PING)]
    kind = kinds[data[0] % len(kinds)]
    transfer = bytes(16) if kind is FrameType.HELLO else b"t" * 16
    header = Header(kind, 0, transfer, 0, 0, len(data) - 1, 0, 0, 0, 0)
    try:
        body = decode_control(header, data[1:], verified=True)
    except KVError:
        return
    raw = encode_control(kind, body, transfer=transfer)
    again = decode_control(unpack_header(raw[:64]), raw[64:])
    assert encode_control(kind, again, transfer=transfer) == raw
    if isinstance(body, bodies.Error):
        assert isinstance(body.to_error().fault, Fault)


def handshake(data: bytes) -> None:
    """HELLOs, as their maps, from a peer that is dialled or dials: agreed on, or refused; never half of it.

    Of one that is agreed on the token, which says who it is or is refused, and the address it wants to be dialled at.
    """
    if not data:
        return
    role = Role.DIAL if data[0] & 1 else Role.ACCEPT
    known = b"P" * 16 if data[0] & 2 else None
    machine = ConnectionMachine(role, incarnation=b"A" * 16, peer_incarnation=known)
    if role is Role.DIAL:
        machine.hello_to_send(link=b"L" * 16)
    state = machine.state
    try:
        hello = bodies.decode_body(bodies.Hello, data[1:])
        machine.receive_hello(hello)
    except KVError:
        assert machine.state is state
        assert machine.peer is None
        return
    assert machine.version in machine.versions
    assert hello.incarnation == machine.peer_incarnation
    assert known in (None, hello.incarnation)
    assert hello.peer_incarnation in (None, b"A" * 16)
    assert "token" not in repr(hello) or "<hidden>" in repr(hello) or hello.token is None
    if role is Role.DIAL:
        assert hello.link == b"L" * 16
        assert machine.state is ConnectionState.READY
    else:
        machine.hello_to_send(link=hello.link)
        assert machine.ready
    if hello.token is not None:
        try:
            identity = TOKENS.check(hello.token, binding=bytes(32), link=hello.link, index=hello.index)
        except KVError:
            assert hello.token != TOKEN.proof(bytes(32), hello.link, hello.index)
        else:
            assert hello.token == TOKEN.proof(bytes(32), hello.link, hello.index)
            assert (identity.name, identity.tenant) == ("fuzz", "tenant")
    if hello.advertised is not None:
        address, incarnation = hello.advertised
        host, port = parse_address(address)
        assert host
        assert 0 < port < 65_536
        assert same_host(host, host)
        assert len(incarnation) == 16


def manifests(data: bytes) -> None:
    """The manifest of an OPEN: decoded and held against a layout, or refused."""
    try:
        manifest = Manifest.decode(data)
    except KVError:
        return
    assert manifest.total_bytes == sum(e.nbytes for e in manifest.extents)
    assert len(manifest.by_slot) == len(manifest.extents)
    assert Manifest.decode(replace(manifest).encode()) == manifest  # encoded anew, not what it was decoded from
    try:
        manifest.check(LAYOUT)
    except KVError:
        return
    assert set(manifest.layers) <= {0, 1}


def coded(data: bytes) -> None:
    """The payload of a coded chunk: decoded to what it says, or a KVError. The first byte says how much of it is repaired.

    0: nothing; 1: lengths and checksum, so that any plane gets to the codecs and through; 2, 3: the input is what was coded, by lz4 or
    zstandard, and then damaged where its next three bytes say.
    """
    if len(data) < 5:
        return
    how, payload, true = data[0] & 3, data[1:], None
    if how == 1:
        payload = _repaired(payload)
    elif how > 1:
        true = payload[4 : 4 + (len(payload) - 4 & ~1)]
        made = encode(_scattered(true, 1 + payload[0] % 16), Codec(how - 1)) if len(true) > 1 else None
        if made is None:
            return  # it would not have become less
        at, flip = int.from_bytes(payload[1:3], "little") % len(made), payload[3]
        assert decode(made) == true
        payload = made[:at] + bytes([made[at] ^ flip]) + made[at + 1 :]
    try:
        nbytes = raw_bytes(payload)
        raw = decode(payload)
    except KVError:
        return
    assert len(raw) == nbytes
    assert len(payload) >= HEADER.size + nbytes // 2
    assert true is None or raw == true
    # The twin takes it apart and puts it together alike.
    planes, again = (bytearray(nbytes // 2), bytearray(nbytes // 2)), bytearray(nbytes)
    _pure.split_planes(raw, None, *planes)
    assert planes[1] == payload[-(nbytes // 2) :]
    _pure.join_planes(again, None, *planes)
    assert again == raw


def _scattered(data: bytes, page: int) -> PageList:
    """The same bytes in pages that lie from last to first."""
    count = -(-len(data) // page)
    base = bytearray(count * page)
    for i in range(count):
        part = data[i * page : (i + 1) * page]
        base[(count - 1 - i) * page : (count - 1 - i) * page + len(part)] = part
    return PageList.pages(base, [(count - 1 - i) * page for i in range(count)], page, len(data))


def _repaired(payload: bytes) -> bytes:
    """Lengths that add up, and the checksum of what comes out if something does."""
    if len(payload) < HEADER.size + 2:
        return payload
    number, _, _, half, _, _ = HEADER.unpack_from(payload)
    body = payload[HEADER.size :]
    half = 1 + half % (len(body) - 1)
    number = (Codec.LZ4, Codec.ZSTD)[number & 1]

    def with_sum(checksum: int) -> bytes:
        return HEADER.pack(number, BF16_PLANES, 0, 2 * half, len(body) - half, checksum) + body

    try:
        raw = decode(with_sum(0))
    except IntegrityError as error:
        return with_sum(int(error.message.split("checksum 0x")[1].split(",")[0], 16))
    except KVError:
        return with_sum(0)
    return with_sum(PageList.of(raw).hash())


def _with(body: bytes, **keys: Any) -> bytes:
    return bytes(msgspec.msgpack.encode(msgspec.msgpack.decode(body) | keys))


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with, made of what the code itself writes."""
    golden: list[bytes] = list(WIRE.GOLDEN)
    if target == "frames":
        return [b"\1" + g for g in golden]
    if target == "control":
        kinds = [t for t in FrameType if t not in (FrameType.DATA, FrameType.CREDIT, FrameType.PING)]
        heads = [(unpack_header(g[:64]), g) for g in golden]
        return [bytes([kinds.index(h.type)]) + g[64 : 64 + h.length] for h, g in heads if h.type in kinds]
    if target == "handshake":
        hellos = [g[64:] for g in golden if unpack_header(g[:64]).type is FrameType.HELLO]
        proved = [_with(hello, token=TOKEN.proof(bytes(32), b"L" * 16, 0)) for hello in hellos]
        hellos += proved + [
            _with(hello, address=address, address_incarnation=b"B" * 16)
            for hello in proved[:1]
            for address in ("10.0.0.1:7777", "[::ffff:127.0.0.1]:1", "localhost:65535", "node.example:80")
        ]
        return [bytes([how]) + hello for hello in hellos for how in range(4)]
    if target == "coded":
        # Small exponents, as caches have: 0x3F80 is 1.0.
        values = [bytes(x for i in range(n) for x in (i * 37 & 255, 0x3F - (i % 3 == 0))) for n in (32, 300, 2000)]
        made = [encode(PageList.of(bytearray(v)), codec) for v in values for codec in (Codec.LZ4, Codec.ZSTD)]
        # A zstandard frame may say how many bytes it becomes; here 4 GiB.
        sized = b"\x28\xb5\x2f\xfd\xe0" + (1 << 32).to_bytes(8, "little") + b"\x01\x00\x00"
        return [
            b"\0" + HEADER.pack(Codec.ZSTD, BF16_PLANES, 0, 4, len(sized), 0) + sized + b"xx",
            *(bytes([how]) + payload for payload in made if payload is not None for how in (0, 1)),
            *(bytes([how, page, 30, 0, flip]) + v for v in values for how in (2, 3) for page, flip in ((2, 0), (6, 4))),
        ]
    sizes = [Manifest.of_objects([0, 1, 4096], transfer=b"t" * 16).encode()]
    return [*sizes, *(Manifest.of_layout(LAYOUT, n, transfer=b"t" * 16).encode() for n in (1, 64, 1000))]


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "handshake": handshake,
    "control": control,
    "manifests": manifests,
    "coded": coded,
}


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else ""
    if target not in TARGETS:
        sys.exit(f"{__doc__}\ntargets: {', '.join(TARGETS)}")
    atheris.Setup([os.environ.get("FUZZ_SELF", sys.argv[0]), *sys.argv[2:]], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
