"""The check for GPUs, tried without one: every part of it works, writes what it found, and says what did not hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from penstock import devices

from conformance_tests.gpu import environment
from conformance_tests.gpu.report import BROKEN, Finding, record, table, write

LIMIT_S = 300
MACHINE = {
    "gpu": "NVIDIA H200",
    "driver": "580",
    "date": "2026-11-21",
    "cores": 2,
    "python": "3.12",
    "versions": {"a": "1"},
}


def run(tmp_path: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    where = ["--records", str(tmp_path), "--document", str(tmp_path / "page.md")]
    command = [sys.executable, "-m", "conformance_tests.gpu", *where, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=environment.ROOT)


def test_without_a_gpu_it_says_so_and_succeeds(tmp_path: Path) -> None:
    if devices.gpu_count():
        pytest.skip("this machine has one")
    done = run(tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("no GPU: ")
    assert list(tmp_path.iterdir()) == []


def test_every_part_works_with_a_cpu_in_its_place(tmp_path: Path) -> None:
    parts = ("device", "agreement", "memory", "speed")  # all but the protocol's tests, of which this is one
    done = run(tmp_path, "--device", "cpu", "--tiny", *(f"--only={part}" for part in parts))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("no-gpu-*.json")
    made = json.loads(path.read_text())
    findings = [Finding(**one) for one in made["findings"]]
    assert not [one for one in findings if one.value == BROKEN]
    assert {
        one.name: one.met for one in findings if one.name.startswith(("honest", "agreement", "doctor", "memory"))
    } == {
        "doctor": True,
        "honest device: --device cuda without a GPU": True,
        "honest device: --device auto without a GPU": True,
        "honest device: served": True,
        **{f"agreement with the CPU: {name}": True for name in ("conv", "transformer", "small", "small_exact")},
        **{f"memory back after {name} goes": True for name in ("conv", "transformer")},
    }
    rows = {one.name.split(":")[0] for one in findings if one.goal.startswith(("≥", "≤"))}
    assert {"conv", "transformer", "small"} <= rows
    assert "two instances against one" in (tmp_path / "page.md").read_text()


def test_a_table_replaces_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Figures\n\nWords.\n")
    for number in (1, 2):
        findings = [Finding("row", str(number), "≥ 2", number >= 2, "seen")]
        path = write(tmp_path, page, record(findings, MACHINE, {"x": number}), findings)
    assert path.name == "nvidia-h200-2026-11-21.json"
    assert json.loads(path.read_text())["raw"] == {"x": 2}
    text = page.read_text()
    assert text.startswith("# Figures\n\nWords.\n\n<!-- begin cuda -->\n## NVIDIA H200, 2026-11-21\n")
    assert [line for line in text.splitlines() if line.startswith("| row")] == [
        "| row | 2        | ≥ 2  | yes | seen |"
    ]


def test_what_does_not_hold_stands_out() -> None:
    assert "**no**" in table([Finding("row", "1", "≥ 2", False)])
