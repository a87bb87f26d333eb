"""Coverage-guided fuzzing of what a peer can say to Python code, with atheris (libFuzzer underneath).

``python tests/fuzz/targets.py TARGET [libFuzzer arguments] [CORPUS...]``; ``make fuzz`` runs all of them. A target returns, or an
invariant does not hold: any exception that is no KVError is a finding.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import atheris

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["kvtransport.wire", "kvtransport.manifest", "kvtransport.layout"]):
    from kvtransport.errors import Fault, KVError
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
    """HELLOs, as their maps, from a peer that is dialled or dials: agreed on, or refused; never half of it."""
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


def manifests(data: bytes) -> None:
    """The manifest of an OPEN: decoded and held against a layout, or refused."""
    try:
        manifest = Manifest.decode(data)
    except KVError:
        return
    assert manifest.total_bytes == sum(e.nbytes for e in manifest.extents)
    assert len(manifest.by_slot) == len(manifest.extents)
    assert Manifest.decode(manifest.encode()) == manifest
    try:
        manifest.check(LAYOUT)
    except KVError:
        return
    assert set(manifest.layers) <= {0, 1}


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
        return [bytes([how]) + hello for hello in hellos for how in range(4)]
    sizes = [Manifest.of_objects([0, 1, 4096], transfer=b"t" * 16).encode()]
    return [*sizes, *(Manifest.of_layout(LAYOUT, n, transfer=b"t" * 16).encode() for n in (1, 64, 1000))]


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "handshake": handshake,
    "control": control,
    "manifests": manifests,
}


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else ""
    if target not in TARGETS:
        sys.exit(f"{__doc__}\ntargets: {', '.join(TARGETS)}")
    atheris.Setup([os.environ.get("FUZZ_SELF", sys.argv[0]), *sys.argv[2:]], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
