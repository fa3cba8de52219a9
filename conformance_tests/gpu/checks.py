"""What must hold on a GPU, whatever its speed: the device is the one that was asked for, and its numbers are right."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conformance_tests.gpu import environment
from conformance_tests.gpu.models import Sizes, inputs
from conformance_tests.gpu.report import Finding
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import Running, serve

# Relative to the largest number of the answer: FP16 keeps 11 bits, and so does TF32, which FP32 is computed in unless
# the model says otherwise.
TOLERANCE = {"conv": 0.02, "transformer": 0.02, "small": 0.005, "small_exact": 1e-5}
CONFORMANCE = (
    "oip/test_datatypes.py", "oip/test_precision.py", "oip/test_infer.py", "oip/test_json.py", "oip/test_metadata.py",
    "extensions/test_binary_tensors.py", "extensions/test_classification.py",
)  # fmt: skip
OF_THE_CPU = "values_that_a_model_cannot_take"  # CUDA's Gather takes every index, and gives 0 for one out of range
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # as a machine without a GPU
START_LIMIT_S = 120.0
GROWTH = 1.1  # of what is in use after a model went, from the second time on
SLACK_BYTES = 32 << 20


class Start(Protocol):
    """Starts a server for a block. `name` is that of its log."""

    def __call__(
        self, name: str, repositories: Sequence[Path], *options: str, environment: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Running]: ...


@dataclass(frozen=True, slots=True)
class Ground:
    """Where the checks run."""

    device: str
    repository: Path  # with the networks
    sizes: Sizes
    tiny: bool
    child: Mapping[str, str]  # environment of child processes
    scratch: Path
    start: "Start"
    options: Sequence[str] = ()  # further ones, of every server

    @property
    def shown(self) -> str:
        """The device as a server names it."""
        return "cuda:0" if self.device == "cuda" else "cpu"


def doctor(ground: Ground) -> Finding:
    said = json.loads(
        environment.output(
            "penstock.cli", "doctor", "--json", "--device", ground.device,
            environment=ground.child, timeout_s=START_LIMIT_S, good=(0, 1),
        )
    )  # fmt: skip
    faults = [f"{one['name']}: {one['fault']}" for one in said["findings"] if one["fault"] and one["stops"]]
    return Finding("doctor", said["verdict"], "works", said["works"], "" if said["works"] else "; ".join(faults))


def served_devices(ground: Ground, server: Running) -> Finding:
    """Every model says in its metadata that it runs where it was to."""
    http = HttpClient(server.http)
    devices: dict[str, str] = {}
    for entry in sorted(path.name for path in ground.repository.iterdir()):
        devices[entry] = http.get(f"/v2/models/{entry}").json()["parameters"]["device"]
    wrong = {name: device for name, device in devices.items() if device != ground.shown}
    return Finding(
        "honest device: served", f"{len(devices) - len(wrong)} of {len(devices)} models on {ground.shown}",
        "all", not wrong, json.dumps(wrong) if wrong else "",
    )  # fmt: skip


def refuses_without_gpu(ground: Ground) -> Finding:
    """`--device cuda` on a machine without a GPU must not serve, and must say why."""
    done = subprocess.run(
        serve([ground.repository], "--device", "cuda", "--model-control-mode", "explicit", "--load-model", "small"),
        capture_output=True, text=True, timeout=START_LIMIT_S, check=False,
        env={**os.environ, **ground.child, **HIDDEN, "XDG_STATE_HOME": str(ground.scratch)},
    )  # fmt: skip
    said = "was to run on cuda" in done.stderr
    return Finding(
        "honest device: --device cuda without a GPU", f"status {done.returncode}", "refused, with the reason",
        done.returncode == 1 and said, "" if said else done.stderr[-300:],
    )  # fmt: skip


def falls_back_without_gpu(ground: Ground) -> Finding:
    """`--device auto` there serves on the CPU, and shows it."""
    options = ("--device", "auto", "--model-control-mode", "explicit", "--load-model", "small")
    with ground.start("fallback", [ground.repository], *options, environment=HIDDEN) as server:
        device = HttpClient(server.http).get("/v2/models/small").json()["parameters"]["device"]
    return Finding("honest device: --device auto without a GPU", f"on {device}", "cpu", device == "cpu")


def agreement(ground: Ground, server: Running, model: str) -> Iterator[Finding]:
    """The model's answers, over the wire, beside those of ONNX Runtime on the CPU."""
    import onnxruntime

    from conformance_tests.carriers import Call, HttpBinary, Input, infer

    network = model.partition("_")[0]
    arrays = inputs(network, ground.sizes, min(8, ground.sizes.most_rows))
    plain = onnxruntime.InferenceSession(
        ground.repository / model / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    [want] = plain.run(["Y"], arrays)
    names = {np.dtype(np.float16): "FP16", np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}
    sent = [Input(name, names[array.dtype], array) for name, array in arrays.items()]
    got = infer(HttpBinary(HttpClient(server.http)), Call(model, sent))["Y"]
    want, got = want.astype(np.float64), got.astype(np.float64)
    difference = float(np.abs(got - want).max() / np.abs(want).max())
    allowed = TOLERANCE[model]
    yield Finding(
        f"agreement with the CPU: {model}", f"{difference:.1e}", f"≤ {allowed:g}",
        bool(difference <= allowed and np.isfinite(got).all()), "largest difference, of the largest number",
    )  # fmt: skip


def conformance(ground: Ground, files: Sequence[str] = CONFORMANCE) -> Finding:
    """The protocol's tests, against a server whose models must run on the device."""
    directory = environment.ROOT / "conformance_tests"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(directory / "pytest.ini"),
        *(str(directory / file) for file in files), f"--serve=--device={ground.device}",
        *(f"--serve={option}" for option in ground.options), "-k", f"not {OF_THE_CPU}",
        "-W", "default",  # whatever versions are there
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **ground.child},
        cwd=environment.ROOT,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else done.stderr[-300:]
    failed = [line.removeprefix("FAILED ") for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Finding(
        f"conformance on {ground.shown}", last.strip("= "), "all pass", done.returncode == 0, "; ".join(failed)[:600]
    )


def memory_returns(ground: Ground, model: str, raw: dict[str, Any]) -> Iterator[Finding]:
    """Loading, asking and unloading again and again leaves as much memory free as the first time."""
    more = ["--tiny"] if ground.tiny else []
    used = environment.result(
        "conformance_tests.gpu.released", ground.repository, model, "--device", ground.device, *more,
        environment=ground.child, timeout_s=180,
    )  # fmt: skip
    raw[f"memory {model}"] = used
    first, last, loaded = used["released"][0], used["released"][-1], max(used["loaded"])
    held = last <= first * GROWTH + SLACK_BYTES
    shown = (
        f"{loaded >> 20} MiB loaded, {first >> 20} after it went once, {last >> 20} after {len(used['loaded'])} times"
    )
    yield Finding(f"memory back after {model} goes", shown, "no growth", held)


def lost_device(ground: Ground) -> Finding:
    """A kernel that writes where it must not: the real error is known for what it is, and the CPU goes on."""
    found = environment.result(
        "conformance_tests.gpu.poison", ground.repository, environment=ground.child, timeout_s=180
    )
    return Finding(
        "a lost GPU is noticed", f"{found['kind']}, version {found['state']}", "DeviceLostError, UNAVAILABLE",
        found["kind"] == "DeviceLostError" and found["state"] == "UNAVAILABLE" and found["cpu_answers"],
        found["message"][:200],
    )  # fmt: skip
