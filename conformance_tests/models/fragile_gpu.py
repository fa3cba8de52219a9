"""A runtime whose models run on a GPU that does not exist, and lose it when they are given a negative number.

It comes to the server as any runtime does: a package on its path with an entry point. `install` makes it one.
"""

from collections.abc import Sequence
from pathlib import Path
from time import monotonic_ns

from penstock import pb
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import Cancelled, Host, ModelFiles, Placement, Reply
from penstock.tensor import Tensor

MODULE = Path(__file__)
CONFIG = """\
backend: "fragile_gpu"
default_model_filename: "model.txt"
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }
"""


def install(path: Path) -> None:
    """Write what makes a server that has `path` on its PYTHONPATH find this runtime."""
    information = path / "fragile_gpu-1.dist-info"
    information.mkdir(parents=True)
    (path / MODULE.name).write_bytes(MODULE.read_bytes())
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile_gpu\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[penstock.runtimes]\nfragile_gpu = fragile_gpu:FragileRuntime\n")


def write_model(repository: Path, name: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.txt").write_text("Y = X, on a GPU.\n")
    (repository / name / "config.pbtxt").write_text(CONFIG)


class FragileInstance:
    max_in_flight = 1
    streams = False
    device = "cuda:0"
    inputs_ready_ns = 0
    outputs_came_ns = 0

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> Sequence[InferResponse | ServingError]:
        self.inputs_ready_ns = self.outputs_came_ns = monotonic_ns()
        return [self._answer(request) for request in batch]

    def _answer(self, request: InferRequest) -> InferResponse:
        given = request.inputs["INPUT0"]
        if (given.array < 0).any():
            raise DeviceLostError("cuda:0 is lost to this process: CUDA failure 700: an illegal memory access")
        return InferResponse(request.model, "", request.id, [Tensor("OUTPUT0", given.datatype, given.array)])

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        raise ServingError(Kind.UNSUPPORTED, "it answers once")

    def close(self) -> None:
        """Nothing is held."""


class FragileRuntime:
    def __init__(self, settings: object) -> None:
        """There are none."""

    def complete(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> pb.ModelConfig:
        return config

    def open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, host: Host | None) -> FragileInstance:
        return FragileInstance()
