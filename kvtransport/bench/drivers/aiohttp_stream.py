"""aiohttp: one streamed request or response body a move; the receiver copies what comes into its place."""

import asyncio

import aiohttp
from aiohttp import web
from common import PING, Region, configuration, in_thread, is_target, obey, offsets, passive, tell

config = configuration()
region = Region(config["region"], random=True)
READ_BYTES = 4 << 20


async def place(content, at):
    async for piece in content.iter_any():
        region.view[at : at + len(piece)] = piece
        at += len(piece)


if is_target():

    async def post(request):
        await place(request.content, int(request.query["offset"]))
        return web.Response(text="done")

    async def get(request):
        offset, nbytes, block = (int(request.query[k]) for k in ("offset", "nbytes", "block"))
        response = web.StreamResponse(headers={"Content-Length": str(nbytes)})
        await response.prepare(request)
        for at in range(offset, offset + nbytes, block):
            await response.write(region.view[at : at + block])
        await response.write_eof()
        return response

    async def echo(request):
        return web.Response(body=await request.read())

    async def serve():
        app = web.Application(client_max_size=1 << 40)
        app.add_routes([web.post("/move", post), web.get("/move", get), web.post("/echo", echo)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        tell("ready", port=site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    in_thread(lambda: asyncio.run(serve()))
    obey(region, passive, passive)
base = f"http://127.0.0.1:{config['target']['port']}"
loop = asyncio.new_event_loop()


async def make_session():
    return aiohttp.ClientSession(read_bufsize=READ_BYTES)


session = loop.run_until_complete(make_session())


async def post_all(command):
    async def body():
        for offset in offsets(command):
            yield region.view[offset : offset + command["block"]]

    async with session.post(f"{base}/move?offset={command['offset']}", data=body()) as response:
        if await response.text() != "done":
            raise SystemExit("a transfer failed")


async def get_all(command):
    query = "&".join(f"{k}={command[k]}" for k in ("offset", "nbytes", "block"))
    async with session.get(f"{base}/move?{query}") as response:
        await place(response.content, command["offset"])


def move(command):
    loop.run_until_complete(post_all(command) if command["op"] == "post" else get_all(command))


def ping(command):
    body = bytes(region.view[:PING])

    async def once():
        async with session.post(f"{base}/echo", data=body) as response:
            await response.read()

    return lambda: loop.run_until_complete(once())


tell("ready")
obey(region, move, ping)
