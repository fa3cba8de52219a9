"""Plausible requests over HTTP, drawn by Hypothesis: a document with faults in an envelope with faults."""

import gzip
import zlib
from urllib.parse import quote

from hypothesis import strategies as st

from conformance_tests.carriers import Call
from conformance_tests.fuzz.calls import CALLS, blobs, document
from conformance_tests.fuzz.cases import HttpCase, head
from conformance_tests.fuzz.documents import broken, dump

MIB = 1 << 20
VERSIONS = ["1", "2", "9", "0", "01", "007", "9" * 25, "-1", "x", "%31", "1.0", ""]
LENGTHS = ["0", "-1", "1", "+7", " 5", "7x", "x", "1e3", "2147483647", "2147483648", "9" * 30, "0x10", "\xb2"]
PATHS = ["/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/models", "/v2/models/", "/",
         "/v2/models/simple", "/v2/models/simple/ready", "/v2/models/simple/config", "/v2/models/simple/stats",
         "/v2/models/simple/versions/1", "/v2/models/simple/versions/2/stats", "/v2/models/simple/infer/",
         "/v2//models/simple/infer", "/v2/models//infer", "/v2/models/simple%2Finfer", "/v2/models/%FF%FE/infer",
         "/v2/models/%/infer", "/v2/models/%00/config", "/v2/models/..%2f..%2fetc/infer", "/v2/models/stats?a=%zz",
         "/v2/models/simple/infer#x", "/v2/models/日本/infer", "/v2/models/" + "x" * 3000 + "/infer",
         "http://elsewhere/v2/models/simple/infer", "*", "/v2/models/simple/generate", "/v2/x"]  # fmt: skip
VERBS = ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"]
HEADERS = [
    ("Accept-Encoding", "gzip;q=0.5, deflate;q=z, *;q=0"), ("Accept-Encoding", "deflate"), ("Accept-Encoding", ",;q=,"),
    ("Accept-Encoding", "gzip;q=nan"), ("Content-Type", "application/octet-stream"), ("Content-Type", "\xff\xfe;;;"),
    ("Connection", "close"), ("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("Upgrade", "websocket"),
    ("Expect", "100-continue"), ("Expect", "fish"), ("Cookie", "a=b" * 500), ("X-Empty", ""), ("X-Long", "v" * 4000),
    ("Authorization", "Bearer x"), ("Host", "again"), ("traceparent", "00-x-y-zz"), ("Range", "bytes=0-1"),
    ("Content-Type", "multipart/form-data"), ("TE", "trailers"), ("X-High", "\xe9\xff"),
    ("Inference-Header-Content-Length", "3"), ("Content-Encoding", "br"), ("Date", "x"), ("triton-request-id", "\x7f"),
]  # fmt: skip


@st.composite
def json_requests(draw: st.DrawFn) -> HttpCase:
    """All data in JSON."""
    call = draw(st.sampled_from(CALLS))
    body = _encoded(draw, dump(draw(broken(document(call)))))
    return _enveloped(draw, call, body, [])


@st.composite
def binary_requests(draw: st.DrawFn) -> HttpCase:
    """Data behind the JSON: sizes may lie, data may be cut, and a length of 0 makes it a raw request."""
    call = draw(st.sampled_from(CALLS))
    text = _encoded(draw, dump(draw(broken(document(call, binary=True)))))
    tail = b"".join(blobs(call))
    match draw(st.integers(0, 12)):
        case 3:
            tail = tail[: draw(st.integers(0, len(tail)))]
        case 5:
            tail += draw(st.binary(min_size=1, max_size=9))
        case 7:
            tail = draw(st.binary(max_size=64))
        case 9:
            text = b""  # a raw request
    length = str(len(text))
    match draw(st.integers(0, 12)):
        case 5:
            length = draw(st.sampled_from(LENGTHS))
        case 7:
            length = str(len(text) + draw(st.integers(-20, len(tail) + 20)))
    return _enveloped(draw, call, text + tail, [("Inference-Header-Content-Length", length)])


def _encoded(draw: st.DrawFn, text: str) -> bytes:
    """UTF-8, seldom something else."""
    match draw(st.integers(0, 30)):
        case 7:
            return text.encode("utf-16", errors="surrogatepass")
        case 11:
            return b"\xef\xbb\xbf" + text.encode(errors="surrogatepass")
        case 13:
            return text.encode(errors="surrogatepass") + draw(st.binary(max_size=4))
    return text.encode(errors="surrogatepass")


def _enveloped(draw: st.DrawFn, call: Call, body: bytes, headers: list[tuple[str, str]]) -> HttpCase:
    path, verb = _path(draw, call), "POST"
    # One of many values far from the ends, which Hypothesis draws more often than the others.
    if draw(st.integers(0, 30)) == 11:
        verb = draw(st.sampled_from(VERBS))
    if draw(st.integers(0, 9)) == 5:
        body, coding = draw(_packed(body))
        headers.append(("Content-Encoding", coding))
    if draw(st.integers(0, 9)) == 5:
        headers.extend(draw(st.lists(st.sampled_from(HEADERS), min_size=1, max_size=4)))
    if draw(st.integers(0, 9)) == 5:
        return HttpCase(head(path, ("Transfer-Encoding", "chunked"), *headers, verb=verb) + draw(_chunks(body)))
    return HttpCase(head(path, ("Content-Length", str(len(body))), *headers, verb=verb) + body)


def _path(draw: st.DrawFn, call: Call) -> str:
    kind = draw(st.integers(0, 30))
    if kind == 11:
        return draw(st.sampled_from(PATHS))
    name = call.model
    if kind == 13:
        name = "".join(f"%{byte:02{draw(st.sampled_from('xX'))}}" for byte in name.encode())
    elif kind == 17:
        name = quote(draw(st.text(max_size=6)), safe=draw(st.sampled_from(["", "/"])))
    version = call.version if kind != 19 else draw(st.sampled_from(VERSIONS))
    return f"/v2/models/{name}{f'/versions/{version}' if version else ''}/infer"


@st.composite
def _packed(draw: st.DrawFn, body: bytes) -> tuple[bytes, str]:
    """A body with a content coding, sound or not, and what its header says."""
    match draw(st.integers(0, 8)):
        case 0 | 1:
            return gzip.compress(body, 1, mtime=0), "gzip"
        case 2:
            return zlib.compress(body), "deflate"
        case 3:
            sound = bytearray(gzip.compress(body, 1, mtime=0))
            sound[draw(st.integers(0, len(sound) - 1))] ^= draw(st.integers(1, 255))
            return bytes(sound), "gzip"
        case 4:
            sound = bytearray(zlib.compress(body))
            return bytes(sound[: draw(st.integers(0, len(sound)))]), "deflate"
        case 5:  # a small bomb: a thousandth of its size on the wire
            return gzip.compress(bytes(draw(st.integers(1, 4)) * MIB), 9, mtime=0), "gzip"
        case 6:
            return gzip.compress(gzip.compress(body, 1, mtime=0), 1, mtime=0), "gzip"
        case 7:
            return zlib.compress(body) + draw(st.binary(max_size=6)), draw(st.sampled_from(["gzip", "deflate"]))
    return body, draw(st.sampled_from(["gzip", "deflate", "identity", "GZIP", "br", "gzip, deflate", "", "x" * 99]))


@st.composite
def _chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """The body in chunks of odd sizes, with extensions and trailers."""
    size = draw(st.sampled_from([1, 2, 3, 7, 100, 4096, MIB]))
    size = max(size, len(body) // 2000)
    form = draw(st.sampled_from(["%x", "%X", "0000%x", "%x;name=value", '%x;a="b c"']))
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    written = b"".join((form % len(part)).encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return written + b"0\r\n" + draw(st.sampled_from([b"", b"X-Trailer: 1\r\n", b"Content-Length: 9\r\n"])) + b"\r\n"
