"""Sends cases and holds each answer against what every answer must be."""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import grpc

from conformance_tests.carriers import read_reply, simple
from conformance_tests.fuzz.calls import document, message
from conformance_tests.fuzz.cases import Case, GrpcCase, Http2Case, HttpCase
from conformance_tests.fuzz.http2 import GOAWAY, HEADERS, RST_STREAM, frames
from conformance_tests.fuzz.mutation import INFER
from conformance_tests.grpc_wire import UNLIMITED, details, pb, status
from conformance_tests.http_wire import LIMIT_S, Answer, Connection, HttpClient, NoAnswerError

LATE_S = 5.0
QUIET_S = 0.1  # a connection that says nothing for so long waits for the rest of a request that will not come
GOOD_EVERY = 50
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}
_VARYING = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")


class Fault(Exception):  # noqa: N818 - what the server did wrong, not an error of the test
    """A case that was not answered as every case must be."""

    @property
    def key(self) -> str:
        """Equal for faults that differ in names and numbers only."""
        return _VARYING.sub("#", str(self))[:200]


class Sender:
    """A client of both protocols, used by one thread. `slowest_s` is the longest that any answer took."""

    def __init__(self, http: str, grpc_address: str) -> None:
        self._http = http
        self._grpc = grpc_address
        self._connection: Connection | None = None
        self._channel = grpc.insecure_channel(grpc_address, UNLIMITED) if grpc_address else None
        self._sent = 0
        self.slowest_s = 0.0

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._drop()
        if self._channel is not None:
            self._channel.close()

    def send(self, case: Case) -> str:
        """The status of the answer, "closed" for none where none is due. Raises Fault."""
        self._sent += 1
        began_s = time.perf_counter()
        try:
            if isinstance(case, GrpcCase):
                return self._over_grpc(case)
            if isinstance(case, Http2Case):
                return self._http2(case)
            return self._over_http(case) if case.framed else self._unframed(case)
        except ConnectionRefusedError:
            raise Fault("the server does not listen") from None
        finally:
            took_s = time.perf_counter() - began_s
            self.slowest_s = max(self.slowest_s, took_s)
            if took_s > LATE_S:
                raise Fault(f"answered only after {took_s:.1f} s")
            if self._sent % GOOD_EVERY == 0:
                self._serves(not isinstance(case, HttpCase))

    def _serves(self, over_grpc: bool) -> None:
        """Raises Fault where a good request is not answered well between the bad ones."""
        try:
            if over_grpc:
                assert self._channel is None or good_over_grpc(self._channel), "the sums are wrong"
            else:
                assert good_over_http(HttpClient(self._http)), "the sums are wrong"
        except (AssertionError, OSError, NoAnswerError, grpc.RpcError) as error:
            raise Fault(f"a good request after it is not answered well: {str(error)[:300]}") from None

    def _over_http(self, case: HttpCase) -> str:
        kept = self._connection is not None
        try:
            answer = self._exchange(case)
        except NoAnswerError as error:
            self._drop()
            if not kept:
                raise Fault(f"no answer: {error}") from None
            return self._over_http(case)  # the connection may have been closed after the answer before
        except TimeoutError:
            self._drop()
            raise Fault(f"no answer within {LIMIT_S} s") from None
        except (AssertionError, ValueError, KeyError) as error:
            self._drop()
            raise Fault(f"not an answer: {type(error).__name__}: {str(error)[:300]}") from None
        if answer.headers.get("connection", "").lower() == "close" or b"\r\nConnection: close\r\n" in case.data:
            self._drop()
        judge(answer, case.bodiless)
        return str(answer.status)

    def _exchange(self, case: HttpCase) -> Answer:
        if self._connection is None:
            self._connection = Connection(self._http)
        self._connection.send(case.data)
        while True:
            answer = self._connection.receive(bodiless=case.bodiless)
            if answer.status >= 200:
                return answer

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.__exit__(None, None, None)
            self._connection = None

    def _unframed(self, case: HttpCase) -> str:
        """Whatever comes back must be whole answers."""
        parts = urlsplit(self._http)
        received, reset = _until_it_ends(
            (parts.hostname or "", parts.port or 80), case.data, lambda data: bool(answers_in(data, False)[0])
        )
        answers, rest = answers_in(received, case.bodiless)
        if rest and not reset:
            raise Fault(f"half an answer: {rest[:200]!r}")
        for number, answer in enumerate(answers):
            judge(answer, case.bodiless and not number)
        return str(answers[0].status) if answers else "closed"

    def _http2(self, case: Http2Case) -> str:
        """What the server did last, as far as frames tell it."""
        host, _, port = self._grpc.rpartition(":")
        received, _ = _until_it_ends((host, int(port)), case.data, lambda data: bool(_ends(data)))
        return _ends(received) or "closed"

    def _over_grpc(self, case: GrpcCase) -> str:
        if self._channel is None:
            raise Fault("there is no gRPC address")
        call: Any = self._channel.unary_unary(case.path)
        try:
            call(case.data, timeout=LIMIT_S)
        except grpc.RpcError as error:
            name = status(error)
            if name not in REFUSALS:
                raise Fault(f"{name}: {details(error)}") from None
            return name
        return "OK"


def judge(answer: Answer, bodiless: bool) -> None:
    """Raises Fault for a status that blames the server, an error that is no JSON error, or an answer that is not whole.

    501 tells of something that is well formed and that the server does not have.
    """
    if answer.status >= 500 and answer.status != 501:
        raise Fault(f"status {answer.status}: {answer.body[:300]!r}")
    try:
        assert answer.status < 300 or answer.headers.get("content-type") == "application/json", answer.headers
        if not bodiless and answer.status >= 300:
            assert [*answer.json()] == ["error"], answer.body[:300]
            assert answer.error, "the error says nothing"
        elif not bodiless:
            _read(answer)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise Fault(f"status {answer.status} with a wrong body: {type(error).__name__}: {str(error)[:300]}") from error


def _read(answer: Answer) -> None:
    plain = Answer(answer.status, answer.headers, answer.inflated())
    if "inference-header-content-length" in answer.headers or ("outputs" in plain.json() and "id" in plain.json()):
        read_reply(plain)


def _until_it_ends(address: tuple[str, int], data: bytes, enough: Callable[[bytes], bool]) -> tuple[bytes, bool]:
    """Send `data` and end our side when `enough` has come, or nothing more does; what came, and whether it was reset.

    Raises Fault where the server does not end its side then.
    """
    received = b""
    with socket.create_connection(address, LIMIT_S) as wire:
        try:
            wire.sendall(data)
            wire.settimeout(QUIET_S)
            with contextlib.suppress(TimeoutError):
                while not enough(received) and (part := wire.recv(1 << 16)):
                    received += part
            wire.settimeout(LATE_S)
            wire.shutdown(socket.SHUT_WR)
            while part := wire.recv(1 << 16):
                received += part
        except TimeoutError:
            raise Fault("the connection is not closed after the client has closed it") from None
        except OSError:  # reset: the server left before it had read everything
            return received, True
    return received, False


def _ends(data: bytes) -> str:
    """How HTTP/2 frames from a server end a call or the connection; "" where they do not."""
    kinds = {kind for kind, _ in frames(data)}
    ends = {GOAWAY: "goaway", RST_STREAM: "reset", HEADERS: "answered"}
    return next((word for kind, word in ends.items() if kind in kinds), "")


def answers_in(data: bytes, bodiless: bool) -> tuple[list[Answer], bytes]:
    """The whole answers that `data` begin with, and the rest; `bodiless` says that the first has no body."""
    answers: list[Answer] = []
    while True:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return answers, data
        first, *lines = head.decode("latin-1").split("\r\n")
        if not re.fullmatch(r"HTTP/1\.1 \d{3} .*", first):
            raise Fault(f"not an answer: {data[:200]!r}")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        number = int(first[9:12])
        if number < 200:
            data = rest
            continue
        size = 0 if bodiless and not answers else int(headers.get("content-length", "0"))
        if len(rest) < size:
            return answers, data
        answers.append(Answer(number, headers, rest[:size]))
        data = rest[size:]


GOOD = simple("good")
SUMS = (GOOD.inputs[0].array + 1).ravel().tolist()


def good_over_http(client: HttpClient) -> bool:
    """Whether the model `simple` adds up."""
    answer = client.post("/v2/models/simple/infer", document(GOOD))
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == SUMS


def good_over_grpc(channel: grpc.Channel) -> bool:
    call: Any = channel.unary_unary(INFER)
    answer = pb.ModelInferResponse.FromString(call(message(GOOD).SerializeToString(), timeout=LIMIT_S))
    return bool(answer.raw_output_contents[0] == (GOOD.inputs[0].array + 1).tobytes())
