"""Typed bodies: what is missing or wrong is named, what is unknown is ignored, what is hostile is cheap."""

from __future__ import annotations

import hashlib
import tracemalloc

import msgpack
import pytest

from kvtransport.errors import (
    Fault,
    IncarnationError,
    KVError,
    LimitError,
    ProtocolError,
    RefusedError,
    RemoteError,
    SpillFullError,
)
from kvtransport.wire import bodies
from kvtransport.wire.bodies import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_RANGES,
    MAX_TEXT,
    Accept,
    Ack,
    Call,
    Cancel,
    Error,
    Hello,
    Open,
    Reply,
    Resume,
    Seal,
    clip,
    decode_body,
    encode_body,
    require_incarnation,
)

M = b"manifest"
VALID: dict[type, dict[str, object]] = {
    Hello: {
        "versions": [1],
        "incarnation": b"i" * 16,
        "link": b"l" * 16,
        "index": 0,
        "count": 1,
        "role": "dial",
    },
    Open: {"manifest": M, "digest": hashlib.sha256(M).digest(), "deadline_s": 1.5, "chunk_bytes": 4096},
    Accept: {"credit": 0, "chunk_bytes": 4096},
    Ack: {"ranges": [[0, 0, 0, 1]]},
    Seal: {"total_bytes": 1, "digest": bytes(32), "chunks": 1},
    Cancel: {},
    Error: {"code": "refused", "message": "no", "fault": "local", "retryable": False},
    Resume: {"ranges": [[0, 0, 0, 1]]},
    Call: {"verb": "get", "args": {}},
    Reply: {"ok": True, "result": {}},
}


def pack(body: object) -> bytes:
    return msgpack.packb(body, use_bin_type=True)


@pytest.mark.parametrize("kind", list(VALID))
def test_valid_bodies_round_trip_and_ignore_unknown_keys(kind):
    body = decode_body(kind, pack(VALID[kind] | {"from_the_future": {"deep": [[[1]]]}}))
    assert decode_body(kind, encode_body(body)) == body


@pytest.mark.parametrize(("kind", "key"), [(k, key) for k in VALID for key in VALID[k] if k is not Reply])
def test_a_missing_or_wrong_key_is_named(kind, key):
    without = {k: v for k, v in VALID[kind].items() if k != key}
    with pytest.raises(ProtocolError, match=f"{kind.__name__} body is not valid.*{key}"):
        decode_body(kind, pack(without))
    wrong = [1] if not isinstance(VALID[kind][key], list) else "text"
    with pytest.raises(ProtocolError, match=f"{kind.__name__} body is not valid.*{key}"):
        decode_body(kind, pack(VALID[kind] | {key: wrong}))


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        (Hello, {"versions": []}, "versions"),
        (Hello, {"versions": [0]}, "versions"),
        (Hello, {"versions": [1] * 17}, "versions"),
        (Hello, {"incarnation": b"i" * 15}, "incarnation"),
        (Hello, {"link": b"l" * 17}, "link"),
        (Hello, {"count": 0}, "count"),
        (Hello, {"count": 1025}, "count"),
        (Hello, {"index": 1, "count": 1}, "index"),
        (Hello, {"name": "n" * 257}, "name"),
        (Hello, {"features": ["f"] * 33}, "features"),
        (Hello, {"features": [""]}, "features"),
        (Hello, {"token": b"t" * 1025}, "token"),
        (Hello, {"role": "server"}, "role"),
        (Hello, {"peer_incarnation": b""}, "peer_incarnation"),
        (Hello, {"window_bytes": -1}, "window_bytes"),
        (Hello, {"window_bytes": 2**63}, "window_bytes"),
        (Hello, {"keepalive_s": 0.0}, "keepalive_s"),
        (Hello, {"address": ""}, "address"),
        (Hello, {"address": "nowhere"}, "address"),
        (Hello, {"address": "a" * 255 + ":1"}, "address"),
        (Hello, {"address": "host:0"}, "address"),
        (Hello, {"address_incarnation": b"i" * 15}, "address_incarnation"),
        (Hello, {"keepalive_s": float("nan")}, "keepalive_s"),
        (Open, {"manifest": b"", "digest": hashlib.sha256(b"").digest()}, "manifest"),
        (Open, {"digest": bytes(32)}, "digest is not the SHA-256 of manifest"),
        (Open, {"digest": bytes(31)}, "digest"),
        (Open, {"deadline_s": float("inf")}, "deadline_s"),
        (Open, {"deadline_s": -1.0}, "deadline_s"),
        (Open, {"chunk_bytes": 0}, "chunk_bytes"),
        (Open, {"checksum": "crc32"}, "checksum"),
        (Open, {"priority": 2**31}, "priority"),
        (Accept, {"credit": 2**63}, "credit"),
        (Ack, {"ranges": [[0, 0, 5, 5]]}, "ranges"),
        (Ack, {"ranges": [[0, 0, 5, 4]]}, "ranges"),
        (Ack, {"ranges": [[0, 0, 0, 1], [2**16, 0, 0, 1]]}, r"ranges\[1\]\[0\]"),
        (Ack, {"ranges": [[0, -1, 0, 1]]}, "ranges"),
        (Ack, {"ranges": [[0, 0, 0, 2**63]]}, "ranges"),
        (Ack, {"ranges": [[0, 0, 0]]}, "ranges"),
        (Ack, {"ranges": [[0, 0, 0, 1]] * (MAX_RANGES + 1)}, "ranges"),
        (Resume, {"ranges": [[0, 0, 1, 0]]}, "ranges"),
        (Seal, {"digest": b""}, "digest"),
        (Cancel, {"reason": "r" * (MAX_TEXT + 1)}, "reason"),
        (Error, {"fault": "mine"}, "fault"),
        (Error, {"retryable": 1}, "retryable"),
        (Call, {"verb": ""}, "verb"),
        (Call, {"verb": "v" * 65}, "verb"),
        (Reply, {"ok": True, "result": None}, "result"),
        (Reply, {"ok": False}, "error"),
        (Reply, {"ok": False, "result": None}, "error"),
        (Reply, {"ok": True, "error": VALID[Error]}, "error"),
        (Reply, {"ok": False, "error": {"code": "x"}}, "message"),
    ],
)
def test_values_out_of_bounds_are_named(kind, change, named):
    with pytest.raises(ProtocolError, match=named) as caught:
        decode_body(kind, pack(VALID[kind] | change))
    assert caught.value.fault is Fault.REMOTE


@pytest.mark.parametrize("kind", list(VALID))
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\xc0",
        pack({1: 2}),
        pack({b"bytes": 2}),
        b"\xdf\xff\xff\xff\xff",
        b"\x81",
        b"\xa9\xff",
        b"\x91" * 100_000,
        b"\x81\xa1x" + b"\x91" * 100_000 + b"\x01",
    ],
    ids=lambda p: p[:6].hex() or "empty",
)
def test_what_is_no_map_of_strings_is_refused(kind, payload):
    with pytest.raises(ProtocolError, match=f"{kind.__name__} body"):
        decode_body(kind, payload)


def test_strings_that_are_not_utf8_are_refused():
    with pytest.raises(ProtocolError, match="utf-8"):
        decode_body(Cancel, b"\x81\xa6reason\xa1\xff")
    with pytest.raises(ProtocolError, match="utf-8"):
        decode_body(Call, b"\x82\xa4verb\xa1v\xa4args\x81\xa1\xff\x01")


@pytest.mark.parametrize("kind", list(VALID))
def test_trailing_bytes_are_refused(kind):
    with pytest.raises(ProtocolError, match="trailing"):
        decode_body(kind, pack(VALID[kind]) + b"\x00")


def test_pickle_like_and_extension_types_are_refused():
    for value in (msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2), [1, [msgpack.ExtType(1, b"")]]):
        with pytest.raises(ProtocolError, match="args holds a"):
            decode_body(Call, pack({"verb": "v", "args": {"a": value}}))
    with pytest.raises(ProtocolError, match="keys are not all strings"):
        decode_body(Call, pack({"verb": "v", "args": {"a": {1: 2}}}))


def test_nesting_is_bounded():
    def nested(levels: int) -> dict[str, object]:
        value: object = 1
        for _ in range(levels - 1):
            value = [value] if _ % 2 else {"k": value}
        return {"a": value}

    for kind, key in ((Call, "args"), (Reply, "result")):
        assert decode_body(kind, pack(VALID[kind] | {key: nested(MAX_DEPTH)}))
        for levels in (MAX_DEPTH + 1, 100, 400):
            with pytest.raises(ProtocolError, match=r"nested (deeper than|too deep)"):
                decode_body(kind, pack(VALID[kind] | {key: nested(levels)}))


@pytest.mark.parametrize(
    "header", [first + b"\xff" * 4 for first in (b"\xdd", b"\xdf", b"\xc6", b"\xdb")], ids=bytes.hex
)
@pytest.mark.parametrize("kind", [Ack, Call, Hello])
def test_a_claimed_length_allocates_nothing(kind, header):
    """Lists, maps, bytes and strings that claim 4 Gi entries, 30 deep, in a few hundred bytes."""
    key = {Ack: b"\xa6ranges", Call: b"\xa4args", Hello: b"\xa8versions"}[kind]
    payload = b"\x81" + key + (b"\x81\xa1a" + header) * 30
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode_body(kind, payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "element", [b"\x90", b"\x80", b"\x81\xa1k\xc0", b"\xdc\x00\x00", b"\xdf\x00\x00\x00\x00"], ids=bytes.hex
)
def test_a_flood_of_containers_is_refused_before_it_is_built(element):
    def flood(count: int) -> bytes:
        return b"\x82\xa4verb\xa1v\xa4args\x81\xa1k\xdd" + count.to_bytes(4, "big") + element * count

    most = MAX_CONTAINERS - 3  # the body, args and the list itself are containers too
    assert len(decode_body(Call, flood(most)).args["k"]) == most
    tracemalloc.start()
    try:
        with pytest.raises(LimitError, match="more than 65536 lists and maps"):
            decode_body(Call, flood(most + 1))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_bytes_that_look_like_containers_are_none():
    """Content of strings, bytes and numbers must not be counted, whatever it is: no refusal by chance."""
    args = {"bin": [b"\x90" * size for size in (31, 255, 65535, 1 << 20)], "str": ["\u0750" * 300, "\u0750" * 40000]}
    args |= {"numbers": [0x90909090, 0x9090, 0x90, -0x6F6F6F6F6F6F6F6F, 1.5]}
    assert decode_body(Call, encode_body(Call(verb="v", args=args))).args == args


def test_the_most_ranges_fit_their_frame():
    ranges = bodies.byte_ranges([(65535, 65535, 2**63 - 2, 2**63 - 1)] * MAX_RANGES)
    assert len(encode_body(Ack(ranges=ranges))) <= 256 << 10


def test_errors_travel_and_turn_their_fault():
    sent = SpillFullError("no room\ud800 left " + "x" * 5000, fault=Fault.LOCAL)
    body = decode_body(Error, encode_body(Error.of(sent)))
    got = body.to_error(prefix="peer: ")
    assert type(got) is SpillFullError
    assert got.fault is Fault.REMOTE
    assert got.retryable
    assert got.message.startswith("peer: no room? left")
    assert len(body.message) == MAX_TEXT
    assert type(Error(code="unheard_of", message="m", fault="remote", retryable=False).to_error()) is RemoteError


def test_the_longest_error_fits_its_frame():
    body = Error(code="c" * 64, message="\U0001f600" * MAX_TEXT, fault="network", retryable=True)
    assert len(encode_body(body)) <= 8 << 10
    assert len(encode_body(Cancel(reason="\U0001f600" * MAX_TEXT))) <= 8 << 10


def test_clip():
    assert clip("short") == "short"
    assert len(clip("x" * 2000)) == MAX_TEXT
    assert clip("abcdef", 3) == "ab…"


def test_the_token_is_not_shown():
    hello = decode_body(Hello, pack(VALID[Hello] | {"token": b"very-secret"}))
    assert hello.token == b"very-secret"
    assert "very-secret" not in repr(hello)
    assert "very-secret" not in str(hello)
    assert "<hidden>" in repr(hello)
    with pytest.raises(ProtocolError) as caught:
        decode_body(Hello, pack(VALID[Hello] | {"token": b"very-secret" * 200}))
    assert "very-secret" not in str(caught.value)


def test_open_of_computes_the_digest_and_checks_the_checksum_name():
    body = Open.of(M, deadline_s=1, chunk_bytes=5)
    assert body.digest == hashlib.sha256(M).digest()
    with pytest.raises(ProtocolError, match="'xxh3' or 'none', got 'md5'"):
        Open.of(M, deadline_s=1, chunk_bytes=5, checksum="md5")


def test_incarnations():
    hello = decode_body(Hello, pack(VALID[Hello] | {"peer_incarnation": b"o" * 16}))
    require_incarnation(hello, b"o" * 16, None)
    require_incarnation(hello, b"o" * 16, b"i" * 16)
    with pytest.raises(IncarnationError, match="this process restarted") as caught:
        require_incarnation(hello, b"p" * 16, None)
    assert caught.value.fault is Fault.LOCAL
    with pytest.raises(IncarnationError, match="the peer restarted") as caught:
        require_incarnation(hello, b"o" * 16, b"j" * 16)
    assert caught.value.fault is Fault.REMOTE
    assert caught.value.retryable


def test_encode_refuses_cyclic_and_foreign_values():
    cyclic: dict[str, object] = {}
    cyclic["me"] = cyclic
    for value in ({"a": object()}, {"a": 2**64}, {"a": "\ud800"}, cyclic):
        with pytest.raises(ProtocolError, match="cannot be encoded") as caught:
            encode_body({"verb": "v", "args": value})
        assert caught.value.fault is Fault.LOCAL


def test_reply_carries_errors():
    error = Error.of(RefusedError("over quota"))
    got = decode_body(Reply, encode_body(Reply(ok=False, error=error)))
    assert got.error == error
    assert isinstance(got.error.to_error(), KVError)
