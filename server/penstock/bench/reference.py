"""What a constant answer costs: a server like ours that does nothing. `python -m penstock.bench.reference [PORT]`.

It answers for the sample model `simple`: metadata to GET, and one and the same binary answer to every POST, whatever
its body. It runs on the very uvicorn that serves Penstock's HTTP, so the difference between the two is Penstock's own
work.
"""

import asyncio
import json
import signal
import socket
import sys

import orjson
import uvloop
from starlette.types import Receive, Scope, Send

from penstock.http_api import make_server
from penstock.settings import Settings

METADATA = orjson.dumps({
    "name": "simple",
    "versions": ["1"],
    "platform": "constant",
    "inputs": [{"name": f"INPUT{number}", "datatype": "INT32", "shape": [-1, 16]} for number in (0, 1)],
    "outputs": [{"name": f"OUTPUT{number}", "datatype": "INT32", "shape": [-1, 16]} for number in (0, 1)],
})  # fmt: skip
HEAD = orjson.dumps({
    "model_name": "simple",
    "model_version": "1",
    "outputs": [
        {"name": f"OUTPUT{number}", "datatype": "INT32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}
        for number in (0, 1)
    ],
})  # fmt: skip
ANSWER = HEAD + bytes(128)


def _headers(body: bytes, *others: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [*others, (b"content-length", b"%d" % len(body))]


METADATA_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": _headers(METADATA, (b"content-type", b"application/json")),
}
ANSWER_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": _headers(
        ANSWER,
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", b"%d" % len(HEAD)),
    ),
}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    if scope["method"] == "POST":
        await send(ANSWER_START)
        await send({"type": "http.response.body", "body": ANSWER})
    else:
        await send(METADATA_START)
        await send({"type": "http.response.body", "body": METADATA})


async def serve(port: int) -> None:
    """Until SIGINT or SIGTERM, on the loopback; prints its address as JSON once it listens. Port 0 is a free one."""
    server = make_server(app, Settings())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    with socket.create_server(("127.0.0.1", port), reuse_port=False) as listener:
        # Connections wait in the listener's queue until uvicorn accepts them, so the address can be given out.
        print(json.dumps({"http": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
        await server.serve(sockets=[listener])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
