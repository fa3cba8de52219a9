"""Stand-ins for the models that an ensemble calls, and for who waits for its answers."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from penstock import model_config, pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, Phases, RequestedOutput
from penstock.model_config import Signature
from penstock.runtime import PLENTY, Cancelled, Credit, Instance, ModelFiles, Placement, Reply
from penstock.tensor import FP32, Tensor
from penstock_runtimes.ensemble import EnsembleRuntime

LIMIT_S = 10.0

Result = InferResponse | ServingError


def parsed(text: str) -> pb.ModelConfig:
    config = pb.ModelConfig()
    text_format.Parse(text, config)
    return config


def signature(inputs: str, outputs: str, batch: int = 0) -> Signature:
    """Tensors such as "X: FP32 -1 3, Y: STRING 1"; a `?` after the name makes an input optional."""
    config = pb.ModelConfig(name="m", max_batch_size=batch)
    for kind, text in ((config.input, inputs), (config.output, outputs)):
        for part in text.split(","):
            name, _, rest = part.strip().partition(":")
            datatype, *dims = rest.split()
            made = kind.add(name=name.rstrip("?"), data_type=f"TYPE_{datatype}", dims=map(int, dims))
            if isinstance(made, pb.ModelInput):
                made.optional = name.endswith("?")
    return model_config.signature(config)


PLAIN = signature("X: FP32 -1", "Y: FP32 -1")


class Sent:
    """A call that a member was given, to be answered by the test."""

    def __init__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], asked: InferRequest, reply: Reply) -> None:
        self.inputs = {name: tensor.array.tolist() for name, tensor in inputs.items()}
        self.arrays = {name: tensor.array for name, tensor in inputs.items()}
        self.outputs = list(outputs)
        self.asked = asked
        self.reply = reply
        self.cancelled: list[ServingError] = []

    def cancel(self, reason: ServingError) -> None:
        self.cancelled.append(reason)

    def answer(
        self, *values: float, final: bool = True, partial: bool = False, computed: Phases | None = None
    ) -> Credit:
        """A tensor of one value for each output that was asked for, and how it was computed."""
        tensors = [
            Tensor(name, FP32, np.array([value], np.float32)) for name, value in zip(self.outputs, values, strict=True)
        ]
        return self.reply(InferResponse("m", "1", self.asked.id, tensors, computed=computed), final, partial)

    def end(self, computed: Phases | None = None) -> Credit:
        return self.reply(InferResponse("m", "1", self.asked.id, [], computed=computed))

    def fail(self, error: ServingError) -> None:
        self.reply(error)


class FakeMember:
    """Keeps what it is asked, or lets `script` answer at once, as a model that runs inline does."""

    def __init__(
        self,
        name: str = "m",
        signature: Signature = PLAIN,
        decoupled: bool = False,
        sums_up: bool = False,
        script: Callable[[Sent], object] | None = None,
    ) -> None:
        self.name = name
        self.signature = signature
        self.decoupled = decoupled
        self.sums_up = sums_up
        self.sent: list[Sent] = []
        self._script = script

    def infer(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, RequestedOutput], asked: InferRequest, reply: Reply
    ) -> Sent:
        sent = Sent(inputs, list(outputs), asked, reply)
        self.sent.append(sent)
        if self._script:
            self._script(sent)
        return sent


class FakeHost:
    def __init__(self, *members: FakeMember) -> None:
        self._members = {member.name: member for member in members}
        self.asked: list[tuple[str, int]] = []

    def member(self, name: str, version: int) -> FakeMember:
        self.asked.append((name, version))
        if name not in self._members:
            raise ServingError(Kind.INVALID, f"no {name}")
        return self._members[name]


class Answers:
    """A reply that keeps what it is given, and has room for so many answers."""

    def __init__(self, room: int = 2**31) -> None:
        self.given: list[tuple[Result, bool]] = []
        self.left = room
        self._changed = threading.Condition()

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        with self._changed:
            assert not any(final for _, final in self.given), "an answer after the last"
            self.given.append((result, final))
            self.left -= 1
            self._changed.notify_all()
        return PLENTY if self.left > 0 else self

    def wait(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.left > 0, LIMIT_S)

    def __await__(self):  # type: ignore[no-untyped-def]
        raise AssertionError("no coroutine waits here")

    def read(self, number: int = 1) -> None:
        with self._changed:
            self.left += number
            self._changed.notify_all()

    def until_last(self) -> list[Result]:
        with self._changed:
            assert self._changed.wait_for(lambda: any(final for _, final in self.given), LIMIT_S), self.given
        return [result for result, _ in self.given]

    def values(self) -> list[dict[str, list[float]]]:
        """All answers, as they came."""
        shown = []
        for result, _ in self.given:
            assert isinstance(result, InferResponse), result
            shown.append({tensor.name: tensor.array.tolist() for tensor in result.outputs})
        return shown

    def computed(self) -> list[Phases | None]:
        """What the answers say of how they were computed."""
        return [result.computed for result, _ in self.given if isinstance(result, InferResponse)]

    def error(self) -> ServingError:
        [(result, final)] = self.given
        assert isinstance(result, ServingError)
        assert final
        return result


FILES = ModelFiles("e", 1, Path("/nowhere"), Path("/nowhere/1"))


def opened(text: str, *members: FakeMember, files: ModelFiles = FILES) -> Instance:
    """The ensemble `e` of a configuration in text form, on these members."""
    config = parsed(f'name: "e" platform: "ensemble" {text}')
    model_config.validate(config)
    return EnsembleRuntime({}).open(files, config, Placement("cpu"), FakeHost(*members))


def request(values: Mapping[str, float], *outputs: str, id: str = "r") -> InferRequest:
    inputs = {name: Tensor(name, FP32, np.array([value], np.float32)) for name, value in values.items()}
    return InferRequest("e", "", id, inputs, {name: RequestedOutput(name) for name in outputs})


def start(instance: Instance, asked: InferRequest | None = None, room: int = 2**31) -> tuple[Answers, Cancelled]:
    answers, cancelled = Answers(room), Cancelled()
    instance.start(asked or request({"X": 1}), answers, cancelled)
    return answers, cancelled
