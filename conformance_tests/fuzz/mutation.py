"""Good bytes with some of them changed: JSON text, binary bodies, protobuf, and whole HTTP requests."""

import re
from collections.abc import Sequence
from functools import cache
from random import Random

from conformance_tests.carriers import infer_path
from conformance_tests.fuzz.calls import CALLS, blobs, document, message
from conformance_tests.fuzz.cases import GrpcCase, HttpCase, head, request
from conformance_tests.fuzz.documents import dump, thaw
from conformance_tests.grpc_wire import pb

SERVICE = "/inference.GRPCInferenceService/"
INFER = f"{SERVICE}ModelInfer"
INTEGERS = [0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63,
            2**64 - 1, -1, -128]  # fmt: skip
DIGITS = re.compile(rb"[0-9]+")


def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """`data` after one to five changes; some bring in a piece of one of the others."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        at = random.randrange(len(changed) + 1)
        end = min(len(changed), at + random.choice((1, 1, 2, 4, 8, 32)))
        match random.randrange(10):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.choice((0, 0x7F, 0x80, 0xFF, 0x22, 0x0A, random.randrange(256)))
            case 2:
                changed[at:at] = random.randbytes(random.choice((1, 2, 4, 16)))
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = changed[at:end] * random.choice((1, 2, 50))
            case 5:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                changed[at:end] = other[start : start + random.choice((1, 4, 16, 200))]
            case 6:
                del changed[at:]
            case 7:
                changed[at:end] = _integer(random)
            case 8:
                if found := list(DIGITS.finditer(changed)):
                    number = random.choice(found)
                    changed[number.start() : number.end()] = b"%d" % random.choice(INTEGERS)
            case _:
                _count(random, changed, at)
    return bytes(changed)


def _integer(random: Random) -> bytes:
    """A number that something may be just too small for: little-endian, big-endian, or a varint."""
    value = random.choice(INTEGERS)
    if random.randrange(3) == 0:
        return varint(value)
    size = random.choice((1, 2, 4, 8))
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little" if random.random() < 0.5 else "big")


def _count(random: Random, data: bytearray, at: int) -> None:
    """A byte, which may be a length, a little or very different."""
    if at < len(data):
        data[at] = (data[at] + random.choice((-1, 1, 2, 127, 128))) % 256


def varint(value: int) -> bytes:
    """As protobuf writes it; negative ones in ten bytes."""
    value %= 2**64
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


@cache
def _texts() -> tuple[tuple[str, bytes, bytes], ...]:
    """(path, JSON, b"") of every call in JSON, and (path, JSON, data) in the binary form."""
    made = []
    for call in CALLS:
        path = infer_path(call.model, call.version)
        made.append((path, dump(thaw(document(call))).encode(), b""))
        made.append((path, dump(thaw(document(call, binary=True))).encode(), b"".join(blobs(call))))
    return tuple(made)


def json_bytes(random: Random) -> HttpCase:
    """JSON text with changed bytes; the framing is true."""
    corpus = _texts()[::2]
    path, text, _ = random.choice(corpus)
    return request(path, mutate(random, text, [other for _, other, _ in corpus]))


def binary_bytes(random: Random) -> HttpCase:
    """JSON, data, or both with changed bytes; the header length is true for the text that was, or for the changed."""
    corpus = _texts()[1::2]
    path, text, data = random.choice(corpus)
    length = len(text)
    if random.randrange(3):
        text = mutate(random, text, [other for _, other, _ in corpus])
        length = random.choice((length, len(text), len(text), len(text)))
    else:
        data = mutate(random, data, [other for _, _, other in corpus])
    if random.randrange(20) == 0:
        length = random.choice(INTEGERS)
    return request(path, text + data, ("Inference-Header-Content-Length", str(length)))


@cache
def _raw_requests() -> tuple[bytes, ...]:
    made = [request(path, text).data for path, text, data in _texts() if not data][::3]
    for path, text, data in _texts()[1::6]:
        made.append(request(path, text + data, ("Inference-Header-Content-Length", str(len(text)))).data)
    path, text, _ = _texts()[0]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (text[:5], text[5:99], text[99:])) + b"0\r\n\r\n"
    made.append(head(path, ("Transfer-Encoding", "chunked")) + chunks)
    made.append(head(path, ("Expect", "100-continue"), ("Content-Length", str(len(text)))) + text)
    made.append(head(path, ("Upgrade", "h2c"), ("Connection", "Upgrade"), ("Content-Length", str(len(text)))) + text)
    for path in ("/v2", "/v2/health/live", "/v2/models/simple/config", "/v2/models/stats"):
        made.append(head(path, ("Accept-Encoding", "gzip"), verb="GET"))
    made.append(made[-1] + made[0] + made[-2])  # pipelined
    return tuple(made)


def http_bytes(random: Random) -> HttpCase:
    """Request line, headers and body with changed bytes."""
    corpus = _raw_requests()
    return HttpCase(mutate(random, random.choice(corpus), corpus), framed=False)


@cache
def _messages() -> tuple[bytes, ...]:
    return tuple(
        message(call, typed=typed).SerializeToString(deterministic=True) for call in CALLS for typed in (False, True)
    )


def message_bytes(random: Random) -> GrpcCase:
    """A ModelInferRequest with changed bytes."""
    return GrpcCase(INFER, mutate(random, random.choice(_messages()), _messages()))


@cache
def _control() -> tuple[tuple[str, bytes], ...]:
    """Messages of methods that change nothing, whether or not the server has them."""
    named = {
        "ModelReady": pb.ModelReadyRequest(name="simple", version="1"),
        "ModelMetadata": pb.ModelMetadataRequest(name="simple"),
        "ModelConfig": pb.ModelConfigRequest(name="digits", version="1"),
        "ModelStatistics": pb.ModelStatisticsRequest(name="simple"),
        "RepositoryIndex": pb.RepositoryIndexRequest(ready=True),
        "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(name="region"),
        "ServerLive": pb.ServerLiveRequest(),
        "ServerReady": pb.ServerReadyRequest(),
        "ServerMetadata": pb.ServerMetadataRequest(),
    }
    rows = [(SERVICE + method, made.SerializeToString(deterministic=True)) for method, made in named.items()]
    rows += [("/grpc.health.v1.Health/Check", b"\x0a\x06simple"), ("/grpc.health.v1.Health/Check", b"")]
    asked = b"\x3a\x00", b"\x22\x24inference.GRPCInferenceService.Other", b"\x1a\x12grpc_service.proto"
    for version in ("v1", "v1alpha"):
        rows += [(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", question) for question in asked]
    return tuple(rows)


def control_bytes(random: Random) -> GrpcCase:
    """A control message with changed bytes; seldom for a method that is not there."""
    path, body = random.choice(_control())
    if random.randrange(30) == 0:
        path = random.choice((f"{SERVICE}Nothing", "/a/b", "/", f"{SERVICE}", "/grpc.health.v1.Health/check"))
    return GrpcCase(path, mutate(random, body, [other for _, other in _control()]))
