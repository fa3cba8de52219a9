"""`penstock doctor`: what it looks at, when it is content, and what its exit status says."""

import json
import resource

import pytest
from penstock import doctor
from penstock.cli import main
from penstock.devices import Driver, Gpu
from penstock.runtime import Finding

LACKS_CUDA = Finding("ONNX Runtime", "CUDAExecutionProvider", "", "it does not load", ("cuda",))
HAS_CUDA = Finding("ONNX Runtime", "CUDAExecutionProvider", "computes", "", ("cuda",))
HAS_CPU = Finding("ONNX Runtime", "CPUExecutionProvider", "computes", "", ("cpu",))
WARNING = Finding("Machine", "open files", "1024", "each connection takes one")


@pytest.mark.parametrize(
    ("found", "device", "works"),
    [
        ([HAS_CPU, HAS_CUDA], "cuda", True),
        ([HAS_CPU, LACKS_CUDA], "cuda", False),
        ([HAS_CPU, LACKS_CUDA], "cpu", True),
        ([HAS_CPU, LACKS_CUDA, WARNING], "auto", True),
    ],
)
def test_only_what_the_asked_device_needs_keeps_it_from_serving(found: list[Finding], device: str, works: bool) -> None:
    assert (doctor.stopping(found, device) == []) is works
    assert doctor.as_json(found, device)["works"] is works


def test_the_last_line_says_on_what_a_server_would_run() -> None:
    assert doctor.verdict([HAS_CPU, LACKS_CUDA], "auto") == (
        "Serving with --device auto will work, on the CPU; CUDA does not work."
    )
    assert doctor.verdict([HAS_CPU, HAS_CUDA], "auto") == "Serving with --device auto will work, on CUDA."
    assert doctor.verdict([HAS_CPU, LACKS_CUDA], "cuda") == (
        "Serving with --device cuda will not work: see CUDAExecutionProvider."
    )


def test_the_text_marks_faults_and_puts_them_below_what_was_found() -> None:
    assert doctor.as_text([WARNING, LACKS_CUDA], "cpu").splitlines() == [
        "Machine",
        "! open files               1024",
        "                           each connection takes one",
        "ONNX Runtime",
        "! CUDAExecutionProvider    it does not load",
        "",
        "Serving with --device cpu will work.",
    ]


def test_a_driver_and_its_gpus_are_told() -> None:
    shown = Driver("580.159.03", (13, 0), (Gpu(0, "NVIDIA H200", "9.0", 143771 << 20),))
    assert [(finding.name, finding.value, finding.fault) for finding in doctor.nvidia(shown)] == [
        ("driver", "580.159.03, for CUDA 13.0 and older", ""),
        ("GPU 0", "NVIDIA H200, 140.4 GiB, compute capability 9.0", ""),
    ]


def test_no_driver_stops_cuda_alone() -> None:
    assert list(doctor.nvidia(Driver(fault="it is not there"))) == [
        Finding("NVIDIA", "driver", "none", "it is not there", ("cuda",))
    ]


@pytest.mark.parametrize(
    ("soft", "hard", "value", "fault"),
    [
        (1024, 1048576, "1024", "each connection takes one; ulimit -n 4096 allows more (at most 1048576)"),
        (
            1024, resource.RLIM_INFINITY, "1024",
            "each connection takes one; ulimit -n 4096 allows more (at most any number)",
        ),
        (4096, 4096, "4096", ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "any number", ""),
    ],
)  # fmt: skip
def test_few_open_files_are_warned_of(soft: int, hard: int, value: str, fault: str) -> None:
    assert doctor.open_files(soft, hard) == Finding("Machine", "open files", value, fault)


def test_dockers_shared_memory_is_warned_of() -> None:
    assert doctor.shared_memory(64 << 20, 64 << 20).fault == (
        "little for tensors; with Docker, --shm-size 2g gives more"
    )
    assert doctor.shared_memory(2 << 30, 1 << 30) == Finding("Machine", "shared memory", "2.0 GiB, 1.0 GiB free")


def test_without_a_runtime_nothing_can_be_served() -> None:
    [finding] = doctor.own([WARNING])
    assert finding.stops == ("cpu", "cuda")
    assert list(doctor.own([HAS_CPU])) == []


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_the_command_looks_at_this_machine_and_its_exit_status_agrees_with_what_it_says(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["doctor", "--device", device, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == device
    assert said["works"] is (status == 0)
    names = [finding["name"] for finding in said["findings"]]
    assert [name for name in ("system", "cores", "open files", "driver", "CPUExecutionProvider") if name in names]
    assert status == 0 or device == "cuda"


def test_the_command_prints_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Machine"
    assert "  CPUExecutionProvider     computes" in said
    assert said[-1].startswith("Serving with --device auto will work")
