"""ZeroMQ: two DEALER sockets to a ROUTER, no copy inside; the receiver copies each message into its place."""

import struct

import zmq
from common import PING, Region, configuration, in_thread, is_target, obey, offsets, passive, tell

SOCKETS = 2
config = configuration()
region = Region(config["region"], random=not is_target())
context = zmq.Context(io_threads=SOCKETS)
if is_target():

    def receive():
        router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.RCVHWM, 64)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        tell("ready", port=port)
        while True:
            sender, head, body = router.recv_multipart(copy=False)
            kind, offset = struct.unpack("<cQ", head.bytes)
            if kind == b"p":
                router.send_multipart([sender, b"", body.buffer])
                continue
            region.view[offset : offset + len(body.buffer)] = body.buffer
            if kind == b"l":
                router.send_multipart([sender, b"", b""])

    in_thread(receive)
    obey(region, passive, passive)
dealers = []
for _ in range(SOCKETS):
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.SNDHWM, 64)
    dealer.connect(f"tcp://127.0.0.1:{config['target']['port']}")
    dealers.append(dealer)


def move(command):
    places, block = offsets(command), command["block"]
    last = len(places) - SOCKETS
    for i, offset in enumerate(places):
        head = struct.pack("<cQ", b"l" if i >= last else b"d", offset)
        dealers[i % SOCKETS].send_multipart([head, region.view[offset : offset + block]], copy=False)
    for dealer in dealers[: len(places)]:
        dealer.recv_multipart()


def ping(command):
    head, part = struct.pack("<cQ", b"p", 0), region.view[:PING]

    def once():
        dealers[0].send_multipart([head, part])
        dealers[0].recv_multipart()

    return once


tell("ready")
obey(region, move, ping)
