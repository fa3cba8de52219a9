"""Frames that no client sends, against a running server: `python -m conformance_tests.fuzz_http2`.

Connections of good HTTP/2 are changed a little (bytes flipped, frames doubled, cut, reordered, made up) and sent in odd
pieces. Whatever comes, the server writes whole frames or closes, answers a good call afterwards, and keeps no
descriptor. A case is its seed: `--seed N --cases 1` sends it again.
"""

import argparse
import contextlib
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc as grpcio

from conformance_tests.carriers import infer_message, simple
from conformance_tests.grpc_wire import GrpcClient, pb
from conformance_tests.server import SAMPLES, penstock
from conformance_tests.tensors import pack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LIMIT_S = 5.0  # for a server to end a connection whose client has said all
CHECK_EVERY = 100  # cases between two good calls
PATHS = ("ModelInfer", "ServerLive", "ModelMetadata", "ModelStreamInfer", "Nope")
EXTRA = ((b"grpc-timeout", b"1m"), (b"grpc-timeout", b"9H"), (b"grpc-encoding", b"gzip"), (b"x-bin", b"AA"),
         (b"content-length", b"7"), (b"te", b"gzip"), (b"connection", b"close"), (b":path", b"/"))  # fmt: skip


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def field(name: bytes, value: bytes, how: int = 0) -> bytes:
    """A literal of up to 126 bytes: 0x40 enters the dynamic table, 0 does not."""
    return bytes((how, len(name))) + name + bytes((len(value),)) + value


def head(random: Random) -> bytes:
    path = f"/inference.GRPCInferenceService/{random.choice(PATHS)}".encode()
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b"te", b"trailers"),
              (b"content-type", b"application/grpc")]  # fmt: skip
    if random.random() < 0.3:
        fields.insert(random.randint(0, 5), random.choice(EXTRA))
    return b"".join(field(name, value, random.choice((0, 0x40, 0x10))) for name, value in fields)


def conversation(random: Random, body: bytes) -> list[bytes]:
    """A good connection's frames: a few calls, and what goes beside them."""
    frames = [
        frame(4, 0, 0, struct.pack(">HI", random.choice((1, 3, 4, 5)), random.choice((0, 1, 16384, 65535, 2**20))))
    ]
    for stream in range(1, 2 * random.randint(1, 6), 2):
        block = head(random)
        at = random.randint(0, len(block))
        if random.random() < 0.2:
            frames += [frame(1, 0, stream, block[:at]), frame(9, 4, stream, block[at:])]
        else:
            frames.append(frame(1, 4, stream, block))
        message = b"\0" + len(body).to_bytes(4, "big") + body
        at = random.randint(0, len(message))
        frames += [frame(0, 0, stream, message[:at]), frame(0, 1, stream, message[at:])]
        frames += random.choice((
            [], [], [frame(8, 0, random.choice((0, stream)), random.randint(0, 2**31 - 1).to_bytes(4, "big"))],
            [frame(6, 0, 0, bytes(8))], [frame(3, 0, stream, bytes(3) + b"\x08")], [frame(2, 0, stream, bytes(5))],
            [frame(7, 0, 0, bytes(8))], [frame(random.randint(10, 255), 0, stream, bytes(9))],
        ))  # fmt: skip
    return frames


def changed(random: Random, frames: list[bytes]) -> bytes:
    """The frames with up to four faults."""
    frames = list(frames)
    for _ in range(random.randint(0, 4)):
        at = random.randrange(len(frames))
        one = bytearray(frames[at])
        if len(one) < 9:
            continue  # cut away already
        match random.randrange(7):
            case 0:
                one[random.randrange(len(one))] ^= 1 << random.randrange(8)
            case 1:
                one[3] = random.randrange(12)  # another type
            case 2:
                one[4] = random.randrange(256)  # other flags
            case 3:
                one[5:9] = random.choice((0, 1, 2, 3, 5, 2**31 - 1, 2**32 - 1)).to_bytes(4, "big")
            case 4:
                frames.insert(random.randrange(len(frames)), bytes(one))
            case 5:
                del one[random.randrange(len(one)) :]
            case 6:
                one += random.randbytes(random.randint(1, 40))
        frames[at] = bytes(one)
    return PREFACE + b"".join(frames)


def send(address: tuple[str, int], random: Random, data: bytes) -> str:
    """What the server did. Raises AssertionError where it hung, or wrote something that is no frame."""
    with socket.create_connection(address, LIMIT_S) as client:
        got = bytearray()
        try:
            at = 0
            while at < len(data):
                size = random.choice((1, 9, 100, 100_000))
                client.sendall(data[at : at + size])
                at += size
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(1 << 16):
                got += part
        except TimeoutError:
            raise AssertionError(f"the server kept a connection open for {LIMIT_S} s") from None
        except OSError:
            return "reset"
    at, last = 0, -1
    while at + 9 <= len(got):
        last = got[at + 3]
        at += 9 + int.from_bytes(got[at : at + 3], "big")
    assert at == len(got), "half a frame"
    return "refused" if last == 7 else "served"


def good(client: GrpcClient) -> None:
    """Raises grpc.RpcError or AssertionError unless a good call is answered well."""
    assert len(client.call("ModelInfer", message()).outputs) == 2
    assert client.call("ServerLive", pb.ServerLiveRequest()).live


def message() -> Any:
    call = simple()
    made = infer_message(call)
    made.raw_input_contents.extend(pack(tensor.datatype, tensor.array) for tensor in call.inputs)
    return made


def main() -> int:
    """Exit status 1 for any fault."""
    parser = argparse.ArgumentParser("python -m conformance_tests.fuzz_http2", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first case; the others follow")
    parser.add_argument("--grpc", help="where a server answers gRPC, such as localhost:8001")
    asked = parser.parse_args()
    began_s = time.monotonic()
    outcomes: dict[str, int] = {}
    with _server(asked.grpc) as (address, pid):
        host, _, port = address.rpartition(":")
        client = GrpcClient(address)
        body = message().SerializeToString()
        good(client)
        before = _descriptors(pid)
        for seed in range(asked.seed, asked.seed + asked.cases):
            random = Random(seed)
            try:
                outcome = send((host, int(port)), random, changed(random, conversation(random, body)))
                if seed % CHECK_EVERY == 0:
                    good(client)
            except (AssertionError, OSError, grpcio.RpcError) as error:
                print(f"seed {seed}: {error!r}")
                return 1
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        good(client)
        limit_s = time.monotonic() + LIMIT_S
        while (after := _descriptors(pid)) > before:
            if time.monotonic() > limit_s:
                print(f"{after - before} descriptors more than before")
                return 1
        client.close()
    print(f"{asked.cases} cases in {time.monotonic() - began_s:.0f} s, no faults: {outcomes}")
    return 0


@contextlib.contextmanager
def _server(grpc: str | None) -> Iterator[tuple[str, int]]:
    """Where gRPC is answered, and by which process; 0 for a server that was there before."""
    if grpc:
        yield grpc, 0
        return
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "server.log")
        with penstock([SAMPLES], log, "--grpc-transport", "native") as running:
            yield running.grpc, running.process.pid
            assert "Traceback" not in log.read_text(), log.read_text()


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir())) if pid else 0


if __name__ == "__main__":
    sys.exit(main())
