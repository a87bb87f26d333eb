"""gRPC: one client stream of raw messages a move, no protobuf; the receiver copies each message into its place."""

from concurrent import futures

import grpc
from common import PING, Region, configuration, is_target, obey, offsets, passive, tell

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
config = configuration()
region = Region(config["region"], random=not is_target())


def same(data):
    return data


if is_target():

    def put(messages, context):
        at = int(dict(context.invocation_metadata())["offset"])
        for message in messages:
            region.view[at : at + len(message)] = message
            at += len(message)
        return b"done"

    handlers = {
        "put": grpc.stream_unary_rpc_method_handler(put, same, same),
        "echo": grpc.unary_unary_rpc_method_handler(lambda message, context: message, same, same),
    }
    server = grpc.server(futures.ThreadPoolExecutor(4), options=UNLIMITED)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("KV", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tell("ready", port=port)
    obey(region, passive, passive)
channel = grpc.insecure_channel(f"127.0.0.1:{config['target']['port']}", options=UNLIMITED)
put_all = channel.stream_unary("/KV/put", same, same)
echo = channel.unary_unary("/KV/echo", same, same)


def move(command):
    messages = (bytes(region.view[o : o + command["block"]]) for o in offsets(command))
    if put_all(messages, metadata=(("offset", str(command["offset"])),)) != b"done":
        raise SystemExit("a transfer failed")


def ping(command):
    body = bytes(region.view[:PING])
    return lambda: echo(body)


tell("ready")
obey(region, move, ping)
