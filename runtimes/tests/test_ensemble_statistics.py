"""What the statistics of an ensemble say of computing is the sum over its steps, whatever those are."""

from collections.abc import Sequence
from pathlib import Path
from time import monotonic_ns

import numpy as np
import pytest
from msgspec.structs import replace
from penstock import model_config
from penstock.cache import ResponseCache
from penstock.errors import Kind, ServingError
from penstock.members import Members
from penstock.messages import InferRequest, InferResponse
from penstock.model import Loaded, Model
from penstock.queueing import Pending
from penstock.runtime import Cancelled, Instance, ModelFiles, Placement, Reply
from penstock.statistics import Duration, Statistics
from penstock.tensor import FP32, Tensor
from penstock_runtimes.ensemble import EnsembleRuntime

from .ensembles import LIMIT_S, Answers, parsed

TENSORS = """
    input { name: "X" data_type: TYPE_FP32 dims: [ -1 ] } output { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] }
    max_batch_size: 4
"""
PHASES = ("compute_input", "compute_infer", "compute_output")


class Negative:
    """Y = -X; fails on 13."""

    max_in_flight = 1
    streams = False
    device = "cpu"
    inputs_ready_ns = 0
    outputs_came_ns = 0

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> Sequence[InferResponse | ServingError]:
        self.inputs_ready_ns = monotonic_ns()
        answers: list[InferResponse | ServingError] = []
        for sent in batch:
            array = sent.inputs["X"].array
            if (np.abs(array) == 13).any():
                answers.append(ServingError(Kind.INTERNAL, "unlucky"))
            else:
                answers.append(InferResponse(sent.model, "1", sent.id, [Tensor("Y", FP32, -array)]))
        self.outputs_came_ns = monotonic_ns()
        return answers

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        raise AssertionError("it takes batches")

    def close(self) -> None:
        """It has nothing."""


class Served:
    """Models by name, as the server holds them."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self._cache = ResponseCache(1 << 20)

    def add(self, name: str, *steps: str, more: str = "") -> Statistics:
        """A model that runs, or an ensemble of these steps such as "model: tensor → tensor". Gives its counts."""
        scheduling = "".join(
            f'step {{ model_name: "{model}" model_version: -1 input_map {{ key: "X" value: "{reads}" }} '
            f'output_map {{ key: "Y" value: "{writes}" }} }}'
            for model, reads, writes in (step.split() for step in steps)
        )
        kind = f'platform: "ensemble" ensemble_scheduling {{ {scheduling} }}' if steps else 'backend: "negative"'
        config = parsed(f'name: "{name}" {TENSORS} {kind} {more}')
        files = ModelFiles(name, 1, Path("/nowhere"), Path("/nowhere/1"))
        host = Members(lambda member, _: self.models[member])
        instance: Instance = Negative()
        if steps:
            instance = EnsembleRuntime({}).open(files, config, Placement("cpu"), host)
        loaded = replace(Loaded(files, config, model_config.signature(config), 0), members=tuple(host.models))
        self.models[name] = Model(loaded, [instance], self._cache)
        return self.models[name].statistics

    def ask(self, name: str, *values: float) -> Answers:
        array = np.array([values], np.float32)
        sent = InferRequest(name, "", "r", {"X": Tensor("X", FP32, array)}, {}, rows=1)
        answers = Answers()
        self.models[name].submit(Pending(sent, answers, Cancelled(), monotonic_ns(), 0))
        answers.until_last()
        for made in self.models.values():
            made.statistics.fold()
        return answers

    def close(self) -> None:
        for made in reversed(self.models.values()):
            assert made.drain(LIMIT_S)
            made.close()


def value(answers: Answers) -> float:
    [(answer, _)] = answers.given
    assert isinstance(answer, InferResponse), answer
    return float(answer.outputs[0].array[0, 0])


def phases(*counts: Statistics) -> list[int]:
    """Nanoseconds of each phase together."""
    return [sum(getattr(one, phase).ns for one in counts) for phase in PHASES]


@pytest.fixture
def served() -> Served:
    return Served()


def test_an_ensemble_has_the_phases_of_its_steps(served: Served) -> None:
    a, b = served.add("a"), served.add("b")
    chain = served.add("chain", "a X T", "b T Y")
    for number in (1, 2):
        assert value(served.ask("chain", number)) == number
    served.close()
    assert phases(chain) == phases(a, b)
    assert all(phases(chain))
    assert [getattr(chain, phase).count for phase in PHASES] == [2, 2, 2]
    assert (chain.inference_count, chain.execution_count, chain.success.count, a.success.count) == (2, 2, 2, 2)
    assert [getattr(chain.batches[1], phase).ns for phase in PHASES] == phases(chain)
    assert [getattr(chain.histograms, phase).total for phase in PHASES] == phases(chain)
    # Its own queue: a request of an ensemble of short models waits for no worker, whatever its steps wait for.
    assert chain.success.ns - chain.queue.ns >= sum(phases(chain))


def test_a_step_that_is_an_ensemble_has_the_phases_of_its_own_steps(served: Served) -> None:
    a = served.add("a")
    inner = served.add("inner", "a X T", "a T Y")
    outer = served.add("outer", "inner X T", "a T Y")
    assert value(served.ask("outer", 5)) == -5
    served.close()
    assert phases(outer) == phases(a)
    assert 0 < phases(inner)[1] < phases(outer)[1]
    assert (inner.success.count, outer.success.count, a.success.count) == (1, 1, 3)


def test_steps_and_ensembles_that_the_cache_answers_compute_nothing(served: Served) -> None:
    kept = "response_cache { enable: true }"
    a, b = served.add("a", more=kept), served.add("b")
    chain = served.add("chain", "a X T", "b T Y")
    whole = served.add("whole", "b X T", "b T Y", more=kept)
    served.ask("chain", 1)
    once = phases(a)
    served.ask("chain", 1)
    assert (a.cache_hit.count, phases(a), phases(chain)) == (1, once, phases(a, b))
    before = phases(b)
    served.ask("whole", 1)
    served.ask("whole", 1)
    served.close()
    assert phases(whole) == [after - earlier for after, earlier in zip(phases(b), before, strict=True)]
    assert (whole.cache_hit.count, whole.cache_miss.count, whole.compute_infer.count) == (1, 1, 1)


def test_a_request_that_fails_touches_nothing_but_the_failures(served: Served) -> None:
    a, b = served.add("a"), served.add("b")
    chain = served.add("chain", "a X T", "b T Y")
    whole = served.add("whole", "b X Y", more="response_cache { enable: true }")
    assert served.ask("chain", 13).error().kind is Kind.INTERNAL
    assert served.ask("whole", 13).error().kind is Kind.INTERNAL
    served.close()
    assert phases(chain) == phases(whole) == [0, 0, 0]
    assert (chain.fail.count, whole.fail.count, a.fail.count, b.fail.count) == (1, 1, 1, 1)
    assert (chain.success, chain.queue, whole.cache_miss, chain.batches) == (Duration(), Duration(), Duration(), {})
    assert (chain.failures["OTHER"], a.failures["BACKEND"]) == (1, 1)
