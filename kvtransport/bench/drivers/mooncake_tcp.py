"""Mooncake Transfer Engine over TCP, peer to peer handshake, batches of 64 MiB."""

from common import PING, Region, configuration, is_target, obey, offsets, passive, tell
from mooncake.engine import TransferEngine

BATCH = 64 << 20
config = configuration()
engine = TransferEngine()
if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
    raise SystemExit("Mooncake's engine did not start")
region = Region(config["region"], random=not is_target())
if engine.register_memory(region.address, region.nbytes):
    raise SystemExit("Mooncake did not take the memory")
calls = {"write": engine.batch_transfer_sync_write, "read": engine.batch_transfer_sync_read}
if is_target():
    tell("ready", port=engine.get_rpc_port(), address=region.address)
    obey(region, passive, passive)
peer = f"127.0.0.1:{config['target']['port']}"
there = config["target"]["address"]


def move(command):
    places = offsets(command)
    size = max(1, BATCH // command["block"])
    for at in range(0, len(places), size):
        some = places[at : at + size]
        mine, theirs = [region.address + o for o in some], [there + o for o in some]
        if calls[command["op"]](peer, mine, theirs, [command["block"]] * len(some)):
            raise SystemExit("a transfer failed")


def ping(command):
    call = engine.transfer_sync_write if command["op"] == "write" else engine.transfer_sync_read

    def once():
        if call(peer, region.address, there, PING):
            raise SystemExit("a transfer failed")

    return once


tell("ready")
obey(region, move, ping)
