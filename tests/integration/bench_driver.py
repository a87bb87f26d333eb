"""A peer for the tests of ``kvbench peers``: plain sockets, the same commands as the real drivers; see drivers/common.py."""

import os
import socket
import struct
import sys

from kvtransport.bench import peers

sys.path.insert(0, str(peers.DRIVERS))
from common import PING, Region, configuration, in_thread, is_target, obey, offsets, passive, tell

config = configuration()
if os.environ.get("BENCH_DRIVER") == "broken":
    raise SystemExit("this one is broken")
region = Region(config["region"], random=not is_target())
if is_target():
    listener = socket.create_server(("127.0.0.1", 0))
    tell("ready", port=listener.getsockname()[1])

    def serve():
        conn, _ = listener.accept()
        while head := conn.recv(17, socket.MSG_WAITALL):
            kind, offset, nbytes = struct.unpack("<cQQ", head)
            view = region.view[offset : offset + nbytes]
            while view:
                view = view[conn.recv_into(view) :]
            if os.environ.get("BENCH_DRIVER") == "corrupts":
                region.view[offset] ^= 1
            conn.sendall(region.view[:PING] if kind == b"p" else b"k")

    in_thread(serve)
    obey(region, passive, passive)
conn = socket.create_connection(("127.0.0.1", config["target"]["port"]))


def move(command):
    for offset in offsets(command):
        conn.sendall(struct.pack("<cQQ", b"m", offset, command["block"]))
        conn.sendall(region.view[offset : offset + command["block"]])
        conn.recv(1, socket.MSG_WAITALL)


def ping(command):
    def once():
        conn.sendall(struct.pack("<cQQ", b"p", 0, PING) + bytes(region.view[:PING]))
        conn.recv(PING, socket.MSG_WAITALL)

    return once


congestion = conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
tell("ready", congestion=congestion)
obey(region, move, ping)
