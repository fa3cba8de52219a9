"""Equal requests are answered from the response cache, where a model asks for it."""

import itertools

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, Output, infer
from conformance_tests.clause_table import clause
from conformance_tests.doors import Document, HttpDoor, known
from conformance_tests.http_wire import HttpClient

needs = pytest.mark.needs
both = pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw"], indirect=True)
NUMBERS = itertools.count(1)  # so that no test finds what another has sent


def ask(carrier: Carrier, array: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", *outputs: str) -> list[str]:
    """Asks for the negative; gives the names of what came."""
    call = Call("cached", [Input("INPUT0", "FP32", array)], [Output(name) for name in outputs], id=str(next(NUMBERS)))
    reply = infer(carrier, call)
    assert reply.id == call.id
    for output in reply.outputs:
        assert output.array.tolist() == (array if output.name == "OUTPUT0" else -array).tolist()
    return [output.name for output in reply.outputs]


def counted(http: HttpClient) -> Document:
    (found,) = known(HttpDoor(http).statistics("cached"))["model_stats"]
    document: Document = found
    return document


def moved(before: Document, after: Document) -> tuple[int, int, int, int]:
    """Executions, successes, hits, misses between the two."""
    first, second = before["inference_stats"], after["inference_stats"]
    return (
        int(after["execution_count"] - before["execution_count"]),
        *(int(second[name]["count"] - first[name]["count"]) for name in ("success", "cache_hit", "cache_miss")),
    )  # type: ignore[return-value]


@both
@clause("cache.hit", "cache.statistics")
@needs("cached")
def test_an_equal_request_is_answered_without_an_execution(carrier: Carrier, http: HttpClient) -> None:
    array = np.full((2, 3), next(NUMBERS), np.float32)
    before = counted(http)
    for _ in range(3):
        ask(carrier, array)
    assert moved(before, after := counted(http)) == (1, 3, 2, 1)
    assert after["inference_count"] - before["inference_count"] == 1
    assert after["inference_stats"]["cache_hit"]["ns"] > before["inference_stats"]["cache_hit"]["ns"]


@both
@clause("cache.durations")
@needs("cached")
def test_hits_and_misses_take_the_time_that_requests_take(carrier: Carrier, http: HttpClient) -> None:
    array = np.full((300, 300), next(NUMBERS), np.float32)
    phases = ("queue", "compute_input", "compute_infer", "compute_output")

    def spent() -> dict[str, int]:
        return {name: int(told["ns"]) for name, told in counted(http)["inference_stats"].items()}

    before = spent()
    ask(carrier, array)
    missed = {name: ns - before[name] for name, ns in spent().items()}
    assert missed["cache_hit"] == missed["fail"] == 0
    # A copy of the answer is kept after the request was computed, which it was looked up before.
    computed_ns = sum(missed[name] for name in phases)
    assert computed_ns < missed["success"] < computed_ns + missed["cache_miss"]
    before = spent()
    ask(carrier, array)
    hit = {name: ns - before[name] for name, ns in spent().items()}
    assert 0 < hit["cache_hit"] == hit["success"] - hit["queue"]
    assert [hit[name] for name in (*phases[1:], "cache_miss", "fail")] == [0] * 5


@both
@clause("cache.hit")
@needs("cached")
def test_other_bytes_shapes_or_outputs_are_another_request(carrier: Carrier, http: HttpClient) -> None:
    array = np.full((2, 3), next(NUMBERS), np.float32)
    before = counted(http)
    ask(carrier, array)
    ask(carrier, array + 0.5)
    ask(carrier, array.reshape(3, 2))
    assert ask(carrier, array, "OUTPUT1") == ["OUTPUT1"]
    assert ask(carrier, array, "OUTPUT1", "OUTPUT0") == ["OUTPUT1", "OUTPUT0"]
    assert moved(before, counted(http)) == (5, 5, 0, 5)


@clause("cache.statistics")
@needs("cached", "simple")
def test_the_metrics_tell_of_the_cache_and_of_models_that_use_it(http_metrics: HttpClient) -> None:
    text = http_metrics.get("/metrics").body.decode()
    for name in ("num_hits_per_model", "num_misses_per_model", "hit_duration_per_model", "miss_duration_per_model"):
        assert f'nv_cache_{name}{{model="cached",version="1"}} ' in text
        assert f'nv_cache_{name}{{model="simple"' not in text
    for name in ("util", "num_entries", "num_hits", "num_misses", "num_lookups", "num_evictions"):
        assert f"\nnv_cache_{name} " in text
