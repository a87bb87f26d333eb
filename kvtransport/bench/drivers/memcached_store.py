"""memcached: 4 KiB values set and got with pylibmc. A store, not a transport: only its latency is compared."""

import ctypes
import signal
import socket
import subprocess
import time

import pylibmc
from common import PING, Region, configuration, is_target, obey, passive, tell

PR_SET_PDEATHSIG = 1
config = configuration()
region = Region(PING, random=True)
if is_target():
    port = config["port"]
    command = ["memcached", "-u", "root", "-l", "127.0.0.1", "-p", str(port), "-m", "64", "-t", "2"]
    libc = ctypes.CDLL(None)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.01)
    tell("ready", port=port, pids=[server.pid])
    obey(region, passive, passive)
client = pylibmc.Client(
    [f"127.0.0.1:{config['target']['port']}"], binary=True, behaviors={"tcp_nodelay": True, "no_block": False}
)
body = bytes(region.view)
client.set("value", body)


def ping(command):
    return (lambda: client.set("value", body)) if command["op"] == "set" else (lambda: client.get("value"))


tell("ready")
obey(region, passive, ping)
