"""The fuzzer itself: a server that misbehaves is found out, and what it fell for can be sent again."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
from hypothesis import strategies as st

from conformance_tests.fuzz.campaign import FAULTS_LIMIT, KINDS, THREADS, UNIT, Make, Unit, plan, run_drawn, run_made
from conformance_tests.fuzz.cases import Case, GrpcCase, Http2Case, HttpCase, read, request, write
from conformance_tests.fuzz.footprint import GROWTH_LIMIT_BYTES, LATE_THREADS, Footprint, growth
from conformance_tests.fuzz.senders import SUMS, Fault, Sender, answers_in, judge
from conformance_tests.http_wire import Answer

JSON = {"content-type": "application/json"}


class Fragile(BaseHTTPRequestHandler):
    """Blames itself for numbers above 99, and dislikes all others."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(document, int):
            self._answer(500 if document > 99 else 400, {"error": "no number is right"})
        else:
            self._answer(200, {"outputs": [{"data": SUMS}]})

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def fragile() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Fragile) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def numbered(number: int) -> HttpCase:
    return request("/", b"%d" % number)


def test_what_is_drawn_is_shrunk_and_written_down(fragile: str, tmp_path: Path) -> None:
    numbers = st.integers(0, 10_000).map(numbered)
    tally = run_drawn(Unit("json", 1, 200), numbers, fragile, "", tmp_path)
    [failure] = tally.failures
    assert "status 500" in failure.text
    assert read(failure.file) == numbered(100)
    with Sender(fragile, "") as sender, pytest.raises(Fault, match="status 500"):
        sender.send(read(failure.file))


def test_a_server_that_fails_always_is_not_asked_on(fragile: str, tmp_path: Path) -> None:
    made = run_made(Unit("json-bytes", 1, 1000), lambda random: numbered(100), fragile, "", tmp_path)
    assert made.statuses == {("json-bytes", "fault"): FAULTS_LIMIT * THREADS}
    drawn = run_drawn(Unit("json", 1, 1000), st.integers(100, 200).map(numbered), fragile, "", tmp_path)
    assert len(drawn.failures) == 1
    assert drawn.cases() < 200


def test_what_is_made_is_written_down_once_for_each_sort(fragile: str, tmp_path: Path) -> None:
    def make(random: Random) -> HttpCase:
        return numbered(random.randrange(200))

    tally = run_made(Unit("json-bytes", 1, 60), make, fragile, "", tmp_path)
    assert tally.statuses["json-bytes", "400"] + tally.statuses["json-bytes", "fault"] == 60
    assert 10 < tally.statuses["json-bytes", "fault"] < 50
    assert len({failure.key for failure in tally.failures}) == len(tally.failures) == 1


@pytest.mark.parametrize(
    "case", [HttpCase(b"GET / HTTP/1.1\r\n\r\n\n{}", False), GrpcCase("/a/b", b"\n\x00"), Http2Case(b"\n")]
)
def test_a_case_in_a_file_is_the_case(case: Case, tmp_path: Path) -> None:
    write(case, tmp_path / "case")
    assert read(tmp_path / "case") == case


@pytest.mark.parametrize("make", [kind.made for kind in KINDS.values() if kind.made])
def test_a_seed_makes_the_same_case_again(make: Make) -> None:
    assert [make(Random(f"{number}")) for number in range(50)] == [make(Random(f"{number}")) for number in range(50)]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500, JSON, b'{"error":"x"}'),
        Answer(503, JSON, b'{"error":"x"}'),
        Answer(400, {"content-type": "text/plain"}, b'{"error":"x"}'),
        Answer(400, JSON, b"Bad Request"),
        Answer(400, JSON, b'{"error":""}'),
        Answer(404, JSON, b'{"detail":"x"}'),
        Answer(404, JSON, b'{"error":"x","detail":"y"}'),
        Answer(404, JSON, b'["error"]'),
        Answer(200, JSON, b'{"data":[NaN]}'),
        Answer(200, JSON, b'{"id":"1","model_name":"m","model_version":"1","outputs":[{"name":"y"}]}'),
        Answer(200, JSON | {"inference-header-content-length": "30"}, b'{"model_name":"m","outputs":[]}'),
    ],
)
def test_a_wrong_answer_is_a_fault(answer: Answer) -> None:
    with pytest.raises(Fault, match=f"status {answer.status}"):
        judge(answer, bodiless=False)


@pytest.mark.parametrize("status", [400, 404, 413, 501])
def test_a_refusal_in_json_is_none(status: int) -> None:
    judge(Answer(status, JSON, b'{"error":"x"}'), bodiless=False)


def test_answers_are_told_apart_and_half_ones_are_left() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    answers, rest = answers_in(b"HTTP/1.1 100 Continue\r\n\r\n" + whole + whole[:-1], bodiless=False)
    assert ([answer.body for answer in answers], rest) == ([b"{}"], whole[:-1])
    with pytest.raises(Fault, match="not an answer"):
        answers_in(b"<html>\r\n\r\n", bodiless=False)


def test_growth_within_its_bounds_is_none() -> None:
    before = Footprint(100, 10, 10)
    assert growth(before, Footprint(100 + GROWTH_LIMIT_BYTES, 10, 10 + LATE_THREADS)) == []
    assert len(growth(before, Footprint(101 + GROWTH_LIMIT_BYTES, 11, 11 + LATE_THREADS))) == 3


def test_a_plan_keeps_the_shares_and_gives_every_unit_a_seed_of_its_own() -> None:
    units = plan(10_000, 7)
    assert [unit.seed for unit in units] == [*range(7, 7 + len(units))]
    assert all(0 < unit.count <= UNIT for unit in units)
    for kind in KINDS.values():
        assert sum(unit.count for unit in units if unit.kind == kind.name) == 100 * kind.share
