"""Stand-ins that come through the same doors as what they stand for."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic_ns

import numpy as np
from google.protobuf import text_format
from penstock import model_config, pb
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.model import Loaded, Model
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Cancelled, Credit, Host, Instance, Member, ModelFiles, Placement, Reply, Runtime
from penstock.tensor import FP32, Tensor

LIMIT_S = 10.0  # no wait of a test takes this long, but a lost answer must not hang it

Result = InferResponse | ServingError

PLAIN = """
    name: "m" backend: "fake"
    input { name: "X" data_type: TYPE_FP32 dims: -1 }
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
"""


def configuration(text: str = PLAIN) -> pb.ModelConfig:
    config = pb.ModelConfig()
    text_format.Parse(text, config)
    return config


def request(*values: float, id: str = "", **outputs: int) -> InferRequest:
    """X of `values`, for model m; `outputs` names outputs and how many classes of each are wanted."""
    x = Tensor("X", FP32, np.array(values or (1.0,), np.float32))
    return InferRequest("m", "", id, {"X": x}, {name: RequestedOutput(name, k) for name, k in outputs.items()})


class Answers:
    """A reply that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Result] = []
        self.ended = 0  # how many final replies came
        self.thread = 0  # that gave the last one
        self._changed = threading.Condition()

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        with self._changed:
            self.given.append(result)
            self.ended += final
            self.thread = threading.get_ident()
            self._changed.notify_all()
        return PLENTY

    def wait_ended(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended > 0, LIMIT_S), "no final answer came"

    def one(self) -> Result:
        """The only answer, once it has come."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended > 0, LIMIT_S), "no answer came"
            assert self.ended == 1
        [answer] = self.given
        return answer

    def error(self) -> ServingError:
        answer = self.one()
        assert isinstance(answer, ServingError)
        return answer

    def values(self) -> list[float]:
        answer = self.one()
        assert isinstance(answer, InferResponse), answer
        return [float(value) for value in answer.outputs[0].array]


def pending(sent: InferRequest | None = None, reply: Reply | None = None) -> Pending:
    sent = sent or request()
    return Pending(sent, reply or Answers(), Cancelled(), monotonic_ns(), sent.deadline_ns)


class EchoInstance:
    """Y = scale · X. Fails the test that lets two executions overlap."""

    max_in_flight = 1
    streams = False

    def __init__(self, scale: float = 1, device: str = "cpu") -> None:
        self.scale = scale
        self.device = device
        self.inputs_ready_ns = 0
        self.outputs_came_ns = 0
        self.batches: list[list[str]] = []  # the ids that ran together
        self.threads: list[int] = []  # where each batch ran
        self.closed = 0
        self._busy = threading.Lock()

    def execute(self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None) -> Sequence[Result]:
        assert self._busy.acquire(blocking=False), "two executions of one instance overlap"
        try:
            assert not self.closed, "an execution on a closed instance"
            self.inputs_ready_ns = monotonic_ns()
            self.batches.append([sent.id for sent in batch])
            self.threads.append(threading.get_ident())
            results = self.answers(batch)
            self.outputs_came_ns = monotonic_ns()
            return results
        finally:
            self._busy.release()

    def answers(self, batch: Sequence[InferRequest]) -> Sequence[Result]:
        return [self.answer(sent) for sent in batch]

    def answer(self, sent: InferRequest) -> InferResponse:
        x = sent.inputs["X"]
        return InferResponse(sent.model, sent.version, sent.id, [Tensor("Y", FP32, x.array * np.float32(self.scale))])

    def start(self, sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        raise AssertionError("not a streaming instance")

    def close(self) -> None:
        self.closed += 1


class GatedInstance(EchoInstance):
    """Each execution says that it has begun, and waits until the gate opens."""

    def __init__(self, scale: float = 1, device: str = "cuda:0") -> None:
        super().__init__(scale, device)
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

    def answers(self, batch: Sequence[InferRequest]) -> Sequence[Result]:
        self.begun.release()
        assert self.gate.wait(LIMIT_S)
        return super().answers(batch)

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=LIMIT_S), "no execution began"


class ScriptedInstance(EchoInstance):
    """Answers a batch as the function says."""

    def __init__(self, script: Callable[[Sequence[InferRequest]], Sequence[Result]], device: str = "cuda:0") -> None:
        super().__init__(device=device)
        self._script = script

    def answers(self, batch: Sequence[InferRequest]) -> Sequence[Result]:
        return self._script(batch)


class FragileInstance(EchoInstance):
    """A GPU that is lost when it is given a negative number."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__(scale, "cuda:0")

    def answer(self, sent: InferRequest) -> InferResponse:
        if (sent.inputs["X"].array < 0).any():
            raise DeviceLostError("cuda:0 is lost")
        return super().answer(sent)


class StreamingInstance(EchoInstance):
    """Keeps what is started until the test replies, or lets `script` reply."""

    streams = True

    def __init__(
        self, max_in_flight: int = 1, script: Callable[[InferRequest, Reply, Cancelled], None] | None = None
    ) -> None:
        super().__init__()
        self.max_in_flight = max_in_flight
        self.started: list[tuple[InferRequest, Reply, Cancelled]] = []
        self._changed = threading.Condition()
        self._script = script

    def execute(self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None) -> Sequence[Result]:
        raise AssertionError("a streaming instance is started")

    def start(self, sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        with self._changed:
            self.started.append((sent, reply, cancelled))
            self._changed.notify_all()
        if self._script:
            self._script(sent, reply, cancelled)

    def wait_started(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.started) >= number, LIMIT_S), "a request was not started"


class CallingInstance(StreamingInstance):
    """Y = what the last of some models makes of what the one before it makes, and so on, of X."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(max_in_flight=2**31)
        self._members = members

    def start(self, sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        self.threads.append(threading.get_ident())
        self._call(0, sent.inputs["X"], sent, reply)

    def _call(self, number: int, tensor: Tensor, sent: InferRequest, reply: Reply) -> None:
        if number == len(self._members):
            reply(InferResponse(sent.model, sent.version, sent.id, [tensor]))
            return

        def go_on(result: Result, final: bool = True, partial: bool = False) -> Credit:
            if isinstance(result, ServingError):
                return reply(result)
            self._call(number + 1, result.outputs[0], sent, reply)
            return PLENTY

        self._members[number].infer({"X": tensor}, {"Y": RequestedOutput("Y")}, sent, go_on)


def calling(*names: str, version: int = -1) -> str:
    """The configuration of a model that calls these in a row, in their highest versions or in one."""
    tensors = ["X", *(f"T{number}" for number in range(len(names) - 1)), "Y"]
    steps = "".join(
        f'step {{ model_name: "{name}" model_version: {version} input_map {{ key: "X" value: "{tensors[number]}" }} '
        f'output_map {{ key: "Y" value: "{tensors[number + 1]}" }} }} '
        for number, name in enumerate(names)
    )
    plain = PLAIN.replace('name: "m" backend: "fake"', 'platform: "ensemble"')
    return f"{plain} ensemble_scheduling {{ {steps} }}"


def loaded(config: pb.ModelConfig | None = None, labels: Mapping[str, tuple[str, ...]] | None = None) -> Loaded:
    """What a load of version 1 found out."""
    config = config or configuration()
    files = ModelFiles(config.name, 1, Path("/nowhere"), Path("/nowhere/1"))
    return Loaded(files, config, model_config.signature(config, labels), load_s=0.25)


def model(*instances: Instance, config: pb.ModelConfig | None = None) -> Model:
    return Model(loaded(config), instances or (EchoInstance(),))


class FakeRuntime:
    """Models are text files: `scale 2` multiplies, `gated 2` does so once its gate opens, `broken` and `crash` fail;
    `fragile 2` does so on a GPU until that is lost.

    `loads` opens the gate that models called `waits` wait for while they load. Configurations with steps make models
    that call others, which must give Y.
    """

    def __init__(self) -> None:
        self.settings: dict[str, dict[str, str]] = {}  # by the backend's name, as it was looked for
        self.places: list[Placement] = []
        self.instances: list[EchoInstance] = []
        self.loading = threading.Semaphore(0)
        self.loads = threading.Event()

    def find(self, name: str, settings: Mapping[str, str]) -> Runtime:
        assert name not in self.settings, "a runtime is looked for once"
        self.settings[name] = dict(settings)
        return self

    def complete(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> pb.ModelConfig:
        done = pb.ModelConfig()
        done.CopyFrom(config)
        if not done.input:
            done.input.add(name="X", data_type=pb.TYPE_FP32, dims=[-1])
        if not done.output:
            done.output.add(name="Y", data_type=pb.TYPE_FP32, dims=[-1])
        return done

    def open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, host: Host | None) -> Instance:
        if steps := config.ensemble_scheduling.step:
            assert host is not None
            members = [host.member(step.model_name, step.model_version) for step in steps]
            for member in members:
                if "Y" not in member.signature.outputs:
                    raise ServingError(Kind.INVALID, f"{member.name} gives no Y")
            return CallingInstance(members)
        path = files.file(config.default_model_filename or "model.txt")
        kind, _, scale = path.read_text().strip().partition(" ")
        if kind == "broken":
            raise ServingError(Kind.INTERNAL, f"no model in {path.name}")
        if kind == "crash":
            raise RuntimeError("the runtime has a bug")
        if kind == "waits":
            self.loading.release()
            assert self.loads.wait(LIMIT_S)
        instance: EchoInstance
        if kind == "fragile":
            instance = FragileInstance(float(scale or 1))
        else:
            made = GatedInstance if kind == "gated" else EchoInstance
            instance = made(float(scale or 1), device=str(place))
        if kind == "gated" and place.device == "cpu":
            instance.device = "cuda:0"  # so that nothing runs on it before the test lets it
        self.places.append(place)
        self.instances.append(instance)
        return instance
