"""NIXL over UCX on TCP, host memory to host memory, batches of 64 MiB, descriptors prepared before the clock starts."""

import base64

from common import PING, Region, configuration, is_target, obey, offsets, passive, tell
from nixl_cu12 import nixl_agent, nixl_agent_config

BATCH = 64 << 20
config = configuration()
agent = nixl_agent("target" if is_target() else "initiator", nixl_agent_config(backends=["UCX"]))
region = Region(config["region"], random=not is_target())
agent.register_memory([(region.address, region.nbytes, 0, "")], "DRAM")
if is_target():
    tell("ready", metadata=base64.b64encode(agent.get_agent_metadata()).decode(), address=region.address)
    obey(region, passive, passive)
peer = agent.add_remote_agent(base64.b64decode(config["target"]["metadata"]))
peer = peer.decode() if isinstance(peer, bytes) else peer
there = config["target"]["address"]
prepared = {}


def prepare(op, places, block):
    key = (op, places[0], len(places), block)
    if key not in prepared:
        mine = agent.get_xfer_descs([(region.address + o, block, 0) for o in places], "DRAM")
        theirs = agent.get_xfer_descs([(there + o, block, 0) for o in places], "DRAM")
        prepared[key] = agent.initialize_xfer(op.upper(), mine, theirs, peer)
    return prepared[key]


def run(handle):
    state = agent.transfer(handle)
    while state not in ("DONE", "ERR"):
        state = agent.check_xfer_state(handle)
    if state == "ERR":
        raise SystemExit("a transfer failed")


def move(command):
    places = offsets(command)
    size = max(1, BATCH // command["block"])
    for at in range(0, len(places), size):
        run(prepare(command["op"], places[at : at + size], command["block"]))


def ping(command):
    handle = prepare(command["op"], [0], PING)
    return lambda: run(handle)


tell("ready")
obey(region, move, ping)
