"""torch.distributed over gloo: sends and receives of tensors, 16 in flight."""

import os

import torch
import torch.distributed as dist
from common import PING, Region, configuration, is_target, obey, offsets, tell

IN_FLIGHT = 16
torch.set_num_threads(1)
config = configuration()
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(config["port"]))
region = Region(config["region"], random=not is_target())
memory = torch.frombuffer(region.view, dtype=torch.uint8)
answer = torch.zeros(1, dtype=torch.uint8)
rank = 1 if is_target() else 0
if is_target():
    tell("ready")  # the rendezvous waits for the other one
dist.init_process_group("gloo", rank=rank, world_size=2)
if not is_target():
    tell("ready")


def move(command):
    waiting = []
    for offset in offsets(command):
        part = memory[offset : offset + command["block"]]
        waiting.append(dist.irecv(part, 0) if rank else dist.isend(part, 1))
        if len(waiting) >= IN_FLIGHT:
            waiting.pop(0).wait()
    for each in waiting:
        each.wait()
    if rank:
        dist.send(answer, 0)
    else:
        dist.recv(answer, 1)


def ping(command):
    part = memory[:PING]

    def once():
        if rank:
            dist.recv(part, 0)
            dist.send(part, 0)
        else:
            dist.send(part, 1)
            dist.recv(part, 1)

    if not rank:
        return once
    for _ in range(command["count"]):
        once()
    return None


obey(region, move, ping)
