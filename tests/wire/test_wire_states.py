"""The state tables, exhaustively: every cell, every pair of sides, and what the refusals say."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from kvtransport.errors import Fault, HandshakeError, IncarnationError, ProtocolError, VersionError
from kvtransport.wire.frames import (
    NO_TRANSFER,
    Flag,
    FrameType,
    decode_control,
    encode_control,
    encode_data,
    unpack_header,
)
from kvtransport.wire.state import (
    CONNECTION_TABLE,
    TERMINAL,
    TRANSFER_TABLE,
    ConnectionEvent,
    ConnectionMachine,
    ConnectionState,
    Role,
    TransferEvent,
    TransferMachine,
    TransferRole,
    TransferState,
)

T = bytes(range(16))
LINK = b"L" * 16
CE, CS, TE, TS = ConnectionEvent, ConnectionState, TransferEvent, TransferState


def connection(role: Role, **kwargs: object) -> ConnectionMachine:
    name = b"D" if role is Role.DIAL else b"A"
    return ConnectionMachine(role, **{"incarnation": name * 16} | kwargs)


def hear_hello(machine: ConnectionMachine, frame: bytes) -> None:
    header = unpack_header(frame[:64])
    machine.receive(header)
    machine.receive_hello(decode_control(header, frame[64:]))


def ready_pair() -> tuple[ConnectionMachine, ConnectionMachine]:
    dial, accept = connection(Role.DIAL), connection(Role.ACCEPT)
    hear_hello(accept, dial.hello_to_send(link=LINK, count=2, name="p"))
    hear_hello(dial, accept.hello_to_send(link=LINK, count=2))
    return dial, accept


def header_of(type: FrameType, transfer: bytes = NO_TRANSFER):
    if type is FrameType.DATA:
        return unpack_header(encode_data(b"x", transfer=T, layer=0, tensor=0, offset=0))
    scope = T if type in (FrameType.CREDIT,) else transfer
    body = {
        FrameType.HELLO: {
            "versions": [1],
            "incarnation": b"A" * 16,
            "link": LINK,
            "index": 0,
            "count": 2,
            "role": "accept",
        },
        FrameType.ERROR: {"code": "limit", "message": "m", "fault": "remote", "retryable": False},
    }.get(type)
    return unpack_header(encode_control(type, body, transfer=scope)[:64])


# ------------------------------------------------------------------------------------------ connections


@pytest.mark.parametrize(("role", "state", "event"), list(itertools.product(Role, CS, CE)))
def test_every_cell_of_the_connection_table(role, state, event):
    machine = connection(role)
    machine.state = state
    to = CONNECTION_TABLE.get((role, state, event))
    if to is not None:
        assert machine.fire(event) is to is machine.state
        return
    with pytest.raises(ProtocolError, match=f"{event} in {state}") as caught:
        machine.fire(event)
    assert machine.state is state
    assert caught.value.fault is (Fault.REMOTE if event.startswith("RECV") else Fault.LOCAL)


def test_a_handshake():
    dial, accept = ready_pair()
    assert dial.ready
    assert accept.ready
    assert dial.version == accept.version == 1
    assert (dial.peer_incarnation, accept.peer_incarnation) == (b"A" * 16, b"D" * 16)
    assert accept.peer.name == "p"
    accept.receive(header_of(FrameType.DATA))
    dial.receive(header_of(FrameType.CREDIT))
    dial.sent(FrameType.DATA, T)


def test_data_before_hello():
    accept = connection(Role.ACCEPT)
    with pytest.raises(ProtocolError, match=r"^got DATA in HELLO_WAIT; expected HELLO$") as caught:
        accept.receive(header_of(FrameType.DATA))
    assert caught.value.fault is Fault.REMOTE
    dial = connection(Role.DIAL)
    dial.hello_to_send(link=LINK)
    with pytest.raises(ProtocolError, match=r"^got CREDIT in HELLO_SENT; expected HELLO$"):
        dial.receive(header_of(FrameType.CREDIT))


def test_a_second_hello_and_anything_after_the_end_are_refused():
    dial, accept = ready_pair()
    with pytest.raises(ProtocolError, match="got HELLO in READY; expected any frame but HELLO"):
        dial.receive(header_of(FrameType.HELLO))
    accept.fire(CE.EOF)
    with pytest.raises(ProtocolError, match="got PING in CLOSED; expected nothing more"):
        accept.receive(header_of(FrameType.PING))


def test_errors_of_a_transfer_leave_the_connection_up_and_others_end_it():
    dial, _ = ready_pair()
    dial.receive(header_of(FrameType.ERROR, T))
    assert dial.ready
    dial.receive(header_of(FrameType.ERROR))
    assert dial.state is CS.CLOSING
    dial.receive(header_of(FrameType.PING))
    with pytest.raises(ProtocolError, match="cannot send PING in CLOSING") as caught:
        dial.sent(FrameType.PING)
    assert caught.value.fault is Fault.LOCAL
    _, accept = ready_pair()
    accept.sent(FrameType.ERROR, T)
    assert accept.ready
    accept.sent(FrameType.ERROR)
    assert accept.state is CS.CLOSING


def test_nothing_is_sent_before_the_handshake():
    dial, accept = connection(Role.DIAL), connection(Role.ACCEPT)
    for machine in (dial, accept):
        with pytest.raises(ProtocolError, match="cannot send DATA in"):
            machine.sent(FrameType.DATA, T)
    with pytest.raises(ProtocolError, match="SEND_HELLO in HELLO_WAIT"):
        accept.hello_to_send(link=LINK)
    dial.hello_to_send(link=LINK)
    with pytest.raises(ProtocolError, match="SEND_HELLO in HELLO_SENT"):
        dial.hello_to_send(link=LINK)


def test_a_bad_hello_body_leaves_the_state_for_the_error_to_be_sent():
    cases = [
        ({"role": "accept"}, HandshakeError, "both sides say they accept"),
        ({"versions": [7, 9]}, VersionError, r"among \[1\], the peer speaks \[7, 9\]"),
        ({"peer_incarnation": b"x" * 16}, IncarnationError, "this process restarted"),
        ({"incarnation": b"x" * 16}, IncarnationError, "the peer restarted"),
    ]
    for change, kind, text in cases:
        accept = connection(Role.ACCEPT, peer_incarnation=b"D" * 16)
        body = {"versions": [1], "incarnation": b"D" * 16, "link": LINK, "index": 0, "count": 1, "role": "dial"}
        frame = encode_control(FrameType.HELLO, body | change)
        header = unpack_header(frame[:64])
        accept.receive(header)
        with pytest.raises(kind, match=text):
            accept.receive_hello(decode_control(header, frame[64:]))
        assert accept.state is CS.HELLO_WAIT
        assert accept.peer is None
        accept.sent(FrameType.ERROR)
        assert accept.state is CS.CLOSING


def test_links_must_agree():
    dial, accept = connection(Role.DIAL), connection(Role.ACCEPT)
    hear_hello(accept, dial.hello_to_send(link=LINK))
    with pytest.raises(HandshakeError, match="expected to answer link 4c4c") as caught:
        accept.hello_to_send(link=b"M" * 16)
    assert caught.value.fault is Fault.LOCAL
    assert accept.state is CS.HELLO_DUE
    accept.peer = None
    with pytest.raises(HandshakeError, match="expected the answer to link 4c4c"):
        hear_hello(dial, accept.hello_to_send(link=b"M" * 16))


def test_hello_while_closing_is_ignored_and_out_of_turn_is_refused():
    dial, accept = connection(Role.DIAL), connection(Role.ACCEPT)
    frame = dial.hello_to_send(link=LINK)
    accept.fire(CE.CLOSE)
    hear_hello(accept, frame)
    assert accept.peer is None
    ready, _ = ready_pair()
    with pytest.raises(ProtocolError, match="RECV_HELLO in READY"):
        ready.receive_hello(decode_control(unpack_header(frame[:64]), frame[64:]))


def test_no_order_of_events_on_two_connected_sides_is_an_error():
    """Breadth first over every state of both sides and of the two (in-order, bounded) directions between them."""
    sends = {CE.SEND_HELLO: "RECV_HELLO", CE.SEND_FRAME: "RECV_FRAME", CE.SEND_ERROR: "RECV_ERROR"}
    start = ((Role.DIAL, CS.IDLE, ()), (Role.ACCEPT, CS.HELLO_WAIT, ()))  # (role, state, on its way to this side)
    seen, todo = {start}, deque([start])
    while todo:
        world = todo.popleft()
        for me in (0, 1):
            role, state, inbox = world[me]
            other_role, other_state, other_inbox = world[1 - me]
            moves = []
            for event in (*sends, CE.CLOSE, CE.EOF):
                to = CONNECTION_TABLE.get((role, state, event))
                if to is None or (event in sends and len(other_inbox) >= 3):
                    continue
                arriving = (sends[event],) if event in sends else ()
                other = (other_role, other_state, other_inbox + arriving)
                moves.append(((role, to, inbox), other))
            if inbox and state is not CS.CLOSED:
                to = CONNECTION_TABLE.get((role, state, CE(inbox[0])))
                assert to is not None, f"{role} {state} got {inbox[0]}; the other side is {other_state}"
                moves.append(((role, to, inbox[1:]), world[1 - me]))
            for mine, other in moves:
                nxt = (mine, other) if me == 0 else (other, mine)
                if nxt not in seen:
                    seen.add(nxt)
                    todo.append(nxt)
    both = {(a[1], b[1]) for a, b in seen}
    assert (CS.READY, CS.READY) in both
    assert (CS.CLOSED, CS.CLOSED) in both


# ------------------------------------------------------------------------------------------ transfers


@pytest.mark.parametrize(("role", "state", "event"), list(itertools.product(TransferRole, TS, TE)))
def test_every_cell_of_the_transfer_table(role, state, event):
    machine = TransferMachine(role)
    machine.state = state
    to = TRANSFER_TABLE.get((role, state, event))
    assert machine.allows(event) is (to is not None)
    if to is not None:
        assert machine.fire(event) is to is machine.state
        assert machine.terminal is (to in TERMINAL)
        return
    with pytest.raises(ProtocolError, match=f"{event} in {state} .{role} side") as caught:
        machine.fire(event)
    assert machine.state is state
    assert caught.value.fault is (Fault.REMOTE if event.startswith("RECV") else Fault.LOCAL)


def test_what_a_refusal_says():
    machine = TransferMachine(TransferRole.RECEIVER)
    with pytest.raises(ProtocolError) as caught:
        machine.fire(TE.RECV_DATA)
    assert caught.value.message == (
        "RECV_DATA in IDLE (receiver side of a transfer); expected one of RECV_OPEN, "
        "SEND_CANCEL, RECV_CANCEL, SEND_ERROR, RECV_ERROR"
    )


def test_the_whole_life_of_a_transfer():
    sender, receiver = TransferMachine(TransferRole.SENDER), TransferMachine(TransferRole.RECEIVER)
    for name in ("OPEN", "ACCEPT", "DATA", "ACK", "CREDIT", "RESUME", "DATA", "SEAL", "DATA", "ACK_FINAL"):
        first, second = (sender, receiver) if name in ("OPEN", "DATA", "SEAL") else (receiver, sender)
        first.fire(TE[f"SEND_{name}"])
        second.fire(TE[f"RECV_{name}"])
    assert sender.state is receiver.state is TS.SEALED
    assert sender.terminal
    assert receiver.terminal


def test_terminal_states_are_never_left_and_every_other_can_be_given_up():
    for (_, state, _), to in TRANSFER_TABLE.items():
        if state in TERMINAL:
            assert to is state
    for role, state in {(role, state) for role, state, _ in TRANSFER_TABLE}:
        if state not in TERMINAL:
            assert TRANSFER_TABLE[role, state, TE.SEND_CANCEL] is TS.CANCELLED
            assert TRANSFER_TABLE[role, state, TE.RECV_CANCEL] is TS.CANCELLED
            assert TRANSFER_TABLE[role, state, TE.SEND_ERROR] is TS.FAILED


def test_no_data_and_no_ack_leave_a_side_after_its_end():
    for (_, state, event), _ in TRANSFER_TABLE.items():
        if state in TERMINAL and event.startswith("SEND"):
            assert event in (TE.SEND_CANCEL, TE.SEND_ERROR, TE.SEND_ACK_FINAL)


def test_events_of_frames():
    credit = header_of(FrameType.CREDIT)
    assert TE.received(credit) is TE.RECV_CREDIT
    assert TE.sending(FrameType.ACK) is TE.SEND_ACK
    assert TE.sending(FrameType.ACK, Flag.FINAL) is TE.SEND_ACK_FINAL
    final = unpack_header(encode_control(FrameType.ACK, {"ranges": []}, transfer=T, flags=Flag.FINAL)[:64])
    assert TE.received(final) is TE.RECV_ACK_FINAL
    with pytest.raises(ProtocolError, match="PING is no frame of a transfer") as caught:
        TE.received(header_of(FrameType.PING))
    assert caught.value.fault is Fault.REMOTE
    with pytest.raises(ProtocolError, match="HELLO is no frame of a transfer") as caught:
        TE.sending(FrameType.HELLO)
    assert caught.value.fault is Fault.LOCAL


def test_loss_repetition_and_reordering_are_never_an_error():
    """Every state that two honest sides can reach together, when any frame ever sent may arrive at any time, or twice.

    A frame once sent stays deliverable for ever: that covers delay, repetition, reordering and (by not delivering)
    loss. Honest means: a receiver acknowledges only after DATA arrived.
    """
    start = (TS.IDLE, TS.IDLE, frozenset(), False)
    seen, todo = {start}, deque([start])
    while todo:
        sender, receiver, sent, got_data = todo.popleft()
        for role, state in ((TransferRole.SENDER, sender), (TransferRole.RECEIVER, receiver)):
            moves = []
            for event in TE:
                if not event.startswith("SEND") or (event is TE.SEND_ACK and not got_data):
                    continue
                to = TRANSFER_TABLE.get((role, state, event))
                if to is not None:
                    moves.append((to, sent | {(role, event.removeprefix("SEND_"))}, got_data))
            for origin, name in sent:
                if origin is role:
                    continue
                to = TRANSFER_TABLE.get((role, state, TE[f"RECV_{name}"]))
                assert to is not None, f"{role} in {state} got {name}; sender {sender}, receiver {receiver}"
                moves.append((to, sent, got_data or (name == "DATA" and role is TransferRole.RECEIVER)))
            for to, now_sent, data in moves:
                nxt = (to, receiver, now_sent, data) if role is TransferRole.SENDER else (sender, to, now_sent, data)
                if nxt not in seen:
                    seen.add(nxt)
                    todo.append(nxt)
    reached = {(s, r) for s, r, _, _ in seen}
    assert (TS.SEALED, TS.SEALED) in reached
    # Only a receiver that sealed can have a sealed sender: nobody believes in bytes that were not acknowledged.
    assert {r for s, r in reached if s is TS.SEALED} == {TS.SEALED}
