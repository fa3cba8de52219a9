"""What becomes of all that a handler can return, yield, report and raise."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import PLENTY, Cancelled, Credit
from penstock.tensor import BYTES, Tensor, objects
from penstock_runtimes.handler.instance import ACKNOWLEDGED, HandlerInstance

from .handlers import LIMIT_S, NOTHING, opened, printed, send

# Handlers that do what their input says, in Python.
PLAIN = """
    import runpod

    async def soon(value):
        return value

    def numbers(*values):
        yield from values

    async def numbers_soon(*values):
        for value in values:
            yield value

    circle = []
    circle.append(circle)

    def handler(job):
        return eval(job["input"])

    runpod.serverless.start({"handler": handler})
"""
GENERATOR = """
    import runpod

    def fail():
        raise ValueError("no more")

    def handler(job):
        for expression in job["input"]:
            yield eval(expression)
        return "ignored"

    runpod.serverless.start({"handler": handler, "return_aggregate_stream": %s})
"""
ASYNC_GENERATOR = GENERATOR.replace("def handler", "async def handler").replace('return "ignored"', "pass")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandlerInstance]:
    with opened(tmp_path_factory.mktemp("m"), PLAIN, max_output_bytes="1000") as instance:
        assert (instance.kind, instance.max_in_flight, instance.device) == ("plain", 1, "cpu")
        yield instance


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("{'a': [1, 2.5, None, True], 'ü': '\\N{SNOWMAN}'}", {"a": [1, 2.5, None, True], "ü": "☃"}),
        ("0", 0),
        ("False", False),
        ("''", ""),
        ("[]", []),
        ("None", None),
        ("{}", {}),
        ("(1, 2)", [1, 2]),
        ("{1: 2}", {"1": 2}),
        ("{'error': '', 'x': 1}", {"x": 1}),
        ("{'error': None}", {}),
        ("{'refresh_worker': False, 'x': 1}", {"x": 1}),
        ("[{'error': 'inside'}]", [{"error": "inside"}]),
        ("soon({'later': 1})", {"later": 1}),
    ],
)
def test_what_json_can_hold_is_the_result(plain: HandlerInstance, returned: str, expected: Any) -> None:
    assert send(plain, returned).result() == expected


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("{'error': 'no luck', 'x': 1}", "no luck"),
        ("{'error': {'code': 7, 'ok': True}}", '{"code": 7, "ok": true}'),
        ("{'error': 5}", "5"),
        ("{'error': {1, }}", "{1}"),
        ("soon({'error': 'later'})", "later"),
        ("float('nan')", "the handler's result cannot be written as JSON: Out of range float values"),
        ("[float('inf')]", "the handler's result cannot be written as JSON: Out of range float values"),
        ("b'x'", "the handler's result cannot be written as JSON: Object of type bytes is not JSON serializable"),
        ("{(1, 2): 3}", "the handler's result cannot be written as JSON: keys must be str, int"),
        ("circle", "the handler's result cannot be written as JSON: Circular reference"),
        ("'\\ud800'", "the handler's result cannot be written as JSON: 'utf-8' codec can't encode"),
        ("'x' * 999", "the handler's result has 1001 bytes, over the limit of 1000"),
    ],
)
def test_what_is_no_result_is_an_error_that_says_why(plain: HandlerInstance, returned: str, expected: str) -> None:
    error = send(plain, returned).error()
    assert error.kind is Kind.INTERNAL
    assert error.message.startswith(expected)


@pytest.mark.parametrize("returned", ["numbers(1, {'two': 2}, None)", "numbers_soon(1, {'two': 2}, None)"])
def test_a_generator_that_a_plain_handler_returns_is_streamed(plain: HandlerInstance, returned: str) -> None:
    sent = send(plain, returned)
    assert sent.result() == []
    assert sent.given == [("chunk", 1), ("chunk", {"two": 2}), ("chunk", None), ("final", [])]


def test_an_exception_is_told_as_the_job_platform_words_it(
    plain: HandlerInstance, caplog: pytest.LogCaptureFixture
) -> None:
    error = send(plain, "1 / 0", id="the-job").error()
    facts = orjson.loads(error.message)
    assert (facts["error_type"], facts["error_message"]) == ("<class 'ZeroDivisionError'>", "division by zero")
    assert facts["error_traceback"].startswith("Traceback (most recent call last):\n")
    assert "handler.py" in facts["error_traceback"]
    assert "worker.py" not in facts["error_traceback"]
    assert facts["runpod_version"] == "0+penstock"
    assert facts["worker_id"].startswith("m-1-")
    assert facts["hostname"]
    assert "failed on request the-job" in caplog.text


def test_an_exception_whose_text_is_no_text_fails_its_job_alone(plain: HandlerInstance) -> None:
    facts = orjson.loads(send(plain, "(_ for _ in ()).throw(ValueError('\\ud800'))").error().message)
    assert facts["error_message"] == "\\ud800"
    facts = orjson.loads(send(plain, "(_ for _ in ()).throw(ValueError('x' * 10**6))").error().message)
    assert facts["error_message"] == f"{'x' * 65536}... (1000000 characters)"
    assert send(plain, "1").result() == 1


def test_an_input_that_is_no_json_is_the_sender_s_mistake(plain: HandlerInstance) -> None:
    error = send(plain, b"{").error()
    assert error.kind is Kind.INVALID
    assert error.message.startswith("input is not JSON: ")


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("code", [GENERATOR, ASYNC_GENERATOR], ids=["generator", "async generator"])
def test_a_generator_s_chunks_come_in_order_and_then_all_of_them_or_none(
    tmp_path: Path, code: str, aggregate: bool
) -> None:
    with opened(tmp_path, code % aggregate, max_output_bytes="1000") as instance:
        assert instance.generator
        values = list(range(100))
        sent = send(instance, [str(value) for value in values])
        assert sent.result() == (values if aggregate else NOTHING)
        assert sent.of("chunk") == values
        assert sent.given[-1][0] == "final"

        sent = send(instance, ["1", "{'error': 'stop', 'x': 1}", "2"])
        assert sent.error().message == "stop"
        assert sent.of("chunk") == [1]

        sent = send(instance, ["1", "fail()"])
        message = sent.error().message
        assert message.startswith("handler: no more\ntraceback: Traceback (most recent call last):\n")
        assert 'raise ValueError("no more")' in message
        assert sent.of("chunk") == [1]

        sent = send(instance, ["1", "float('nan')"])
        assert "chunk cannot be written as JSON" in sent.error().message
        assert send(instance, ["'x' * 2000"]).error().message == (
            "the handler's chunk has 2002 bytes, over the limit of 1000"
        )
        if aggregate:
            sent = send(instance, ["'x' * 600"] * 2)
            assert sent.error().message == "the handler's result has 1208 bytes, over the limit of 1000"
            assert len(sent.of("chunk")) == 1


class Room:
    """Credit that has nothing left until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.asked = threading.Event()

    @property
    def left(self) -> int:
        return int(self._opened.is_set())

    def open(self) -> None:
        self._opened.set()

    def wait(self) -> None:
        self.asked.set()
        self._opened.wait()

    __await__ = PLENTY.__await__


def test_progress_that_nobody_reads_gives_way_to_the_newest(tmp_path: Path) -> None:
    code = """
        import runpod
        async def handler(job):
            for step in range(1000):
                runpod.serverless.progress_update(job, step)
            return runpod.serverless.progress_update(job, "last") or "done"
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code) as instance:
        sent = send(instance, credit=Room())
        assert sent.result() == "done"
        assert sent.given == [("progress", 0), ("final", "done")]


def test_a_generator_waits_until_its_chunks_are_read(tmp_path: Path) -> None:
    code = """
        import runpod
        def handler(job):
            for number in range(500):
                yield number
        runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda slots: 2})
    """
    with opened(tmp_path, code) as instance:
        room = Room()
        sent = send(instance, credit=room)
        assert room.asked.wait(LIMIT_S)
        sent.wait("chunk", 2 * ACKNOWLEDGED)
        other = send(instance, credit=PLENTY)  # shares the process, and so shows that the first one stands still
        assert other.result() is NOTHING
        assert len(sent.of("chunk")) == 2 * ACKNOWLEDGED
        room.open()
        assert sent.result() is NOTHING
        assert sent.of("chunk") == list(range(500))


def test_progress_comes_before_the_result_and_never_after_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    code = """
        import runpod
        from runpod.serverless import progress_update
        seen = []
        def handler(job):
            for old in seen:
                progress_update(old, "too late")
                progress_update({"id": old["id"]}, "too late")
            seen.append(job)
            for step in range(3):
                runpod.serverless.progress_update(job, {"step": step})
            progress_update(job, float("nan"))
            progress_update(job, "x" * 2000)
            progress_update({"id": job["id"]}, "by its id")
            return "done"
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code, max_output_bytes="1000") as instance:
        first, second = send(instance, id="a"), send(instance, id="b")
        assert (first.result(), second.result()) == ("done", "done")
        steps = [("progress", {"step": step}) for step in range(3)]
        for sent in (first, second):
            assert sent.given == [*steps, ("progress", "by its id"), ("final", "done")]
        assert "progress report has 2002 bytes, over the limit of 1000" in "".join(printed(caplog, "a"))


def test_a_handler_gets_the_job_with_what_was_passed_and_no_log_shows_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    code = """
        import runpod
        def handler(job):
            return dict(sorted(job.items()))
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code) as instance:
        passed = {"s3Config": {"accessSecret": "hush"}, "webhook": "http://x", "id": "forged", "input": "forged"}
        sent = send(instance, {"prompt": "p"}, id="job-1", passed=passed)
        expected = {"id": "job-1", "input": {"prompt": "p"}, "s3Config": {"accessSecret": "hush"}}
        assert sent.result() == {**expected, "webhook": "http://x"}
        assert send(instance, 1, id="").result()["id"]  # a request of another door has an id too
    assert "hush" not in caplog.text


def test_a_handler_and_what_is_logged_of_it_know_which_request_handed_the_job_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code = """
        import runpod
        def handler(job):
            print("for", job["requestId"])
            raise ValueError("no luck")
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code) as instance:
        passed = {"requestId": "forged"}
        assert "no luck" in send(instance, 1, id="job-1", passed=passed, request_id="order-17 é").error().message
    said = [record for record in caplog.records if record.__dict__.get("job") == "job-1"]
    assert [record.__dict__["request_id"] for record in said] == ["order-17 é"] * len(said)
    printed, failed = (record.getMessage() for record in said)
    assert printed == "for order-17 é"
    assert failed.startswith("model 'm' failed on request job-1: ")


def test_a_reply_that_fails_is_logged_under_its_request(
    plain: HandlerInstance, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(result: InferResponse | ServingError, final: bool = True, partial: bool = False) -> Credit:
        raise RuntimeError("the door is broken")

    given = Tensor("input", BYTES, objects([b'"1"'], (1,)))
    plain.start(InferRequest("m", "", "lost", {"input": given}, {}), broken, Cancelled())
    assert send(plain, "2").result() == 2  # which came after it
    [record] = [record for record in caplog.records if "the door is broken" in str(record.exc_info)]
    assert record.getMessage() == "model 'm': a reply to request lost failed"
    assert record.__dict__["request_id"] == "lost"


def test_large_inputs_and_results_pass_whole(tmp_path: Path) -> None:
    code = """
        import runpod
        runpod.serverless.start({"handler": lambda job: job["input"][::-1]})
    """
    with opened(tmp_path, code) as instance:
        text = "0123456789" * 800_000
        assert send(instance, text).result() == text[::-1]
