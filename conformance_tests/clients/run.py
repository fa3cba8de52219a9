"""Runs the suites of foreign clients, unmodified and each in an environment of its own, against one server.

`python -m conformance_tests.clients.run` starts Penstock on free ports, with the sample models and the fixtures;
`--url` and `--grpc` name a server that runs. A suite is a directory with `suite.py`, run by pytest, or `suite.mjs`,
run by Node's test runner. Both tell what happened in JUnit's form.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from conformance_tests.clients.environments import BrokenError, MissingError, node_for, python_for
from conformance_tests.models.fixtures import make_fixtures
from conformance_tests.server import HANDLERS, SAMPLES, penstock

HERE = Path(__file__).parent
LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one suite. `problem` is why it did not run to its end, `skipped` why it did not run at all."""

    passed: int = 0
    failures: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    problem: str = ""
    skipped: str = ""

    @property
    def good(self) -> bool:
        return not self.failures and not self.problem

    @property
    def row(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        counts = f"{self.passed:>7}{len(self.failures):>8}{len(self.skips):>9}"
        return f"{counts}  did not finish" if self.problem else counts


def main() -> int:
    suites = {found.parent.name: found for found in sorted(HERE.glob("*/suite.*"))}
    parser = argparse.ArgumentParser(prog="python -m conformance_tests.clients.run", description=__doc__)
    parser.add_argument("--only", action="append", choices=suites, metavar="NAME", help=f"of {', '.join(suites)}")
    parser.add_argument("--url", help="test the server that answers HTTP here, such as http://localhost:8000")
    parser.add_argument("--grpc", help="where that server answers gRPC, such as localhost:8001")
    options = parser.parse_args()
    if bool(options.url) != bool(options.grpc):
        parser.error("--url and --grpc go together")
    results = {}
    with contextlib.ExitStack() as server:
        url, grpc = (options.url.rstrip("/"), options.grpc) if options.url else server.enter_context(started())
        for name in options.only or suites:
            print(f"{name} ...", flush=True)
            results[name] = run(suites[name], url, grpc)
    tell(results)
    return 0 if all(result.good for result in results.values()) else 1


@contextlib.contextmanager
def started() -> Iterator[tuple[str, str]]:
    """Penstock with every model that the suites need: its addresses for HTTP and gRPC."""
    with tempfile.TemporaryDirectory() as directory:
        fixtures = Path(directory) / "fixtures"
        make_fixtures(fixtures)
        with penstock([SAMPLES, HANDLERS, fixtures], Path(directory) / "server.log") as running:
            yield running.http, running.grpc


def run(suite: Path, url: str, grpc: str) -> Result:
    """One suite from its environment to its result, in LIMIT_S without what installing takes."""
    directory = suite.parent
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        try:
            command = command_for(suite, report)
        except MissingError as error:
            return Result(skipped=str(error))
        except BrokenError as error:
            return Result(problem=str(error))
        addresses = {"SERVER_URL": url, "SERVER_GRPC": grpc, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
        # A session of its own, because a suite has children too, which must not outlive it.
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | addresses,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return Result(problem=f"took more than {LIMIT_S:.0f} s\n{output.decode(errors='replace')}")
        return read(report, process.returncode, output.decode(errors="replace"))


def command_for(suite: Path, report: Path) -> list[str]:
    """What runs the suite, once its environment is there. Raises MissingError and BrokenError."""
    directory = suite.parent
    node = node_for(directory) if (directory / "package.json").exists() else ""
    if suite.suffix == ".mjs":
        return [node, "--test", "--test-reporter=junit", f"--test-reporter-destination={report}", suite.name]
    pytest = [str(python_for(directory)), "-m", "pytest", suite.name, "-c", str(HERE / "suites.ini")]
    return [*pytest, "--rootdir", ".", "-p", "no:cacheprovider", f"--junitxml={report}"]


def read(report: Path, status: int, output: str) -> Result:
    """The result as the suite reported it. One that ended badly without naming a failure did not finish."""
    passed, failures, skips = 0, [], []
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        name, failed, skipped = case.get("name", ""), case.find("failure"), case.find("skipped")
        if failed is None:
            failed = case.find("error")
        if failed is not None:
            failures.append(f"{name}\n{failed.text or failed.get('message', '')}")
        elif skipped is not None:
            skips.append(f"{name}: {skipped.get('message', '')}")
        else:
            passed += 1
    unexplained = not failures and (status != 0 or not passed)
    return Result(passed, tuple(failures), tuple(skips), f"exit status {status}\n{output}" if unexplained else "")


def tell(results: dict[str, Result]) -> None:
    """Print what failed in full, the reasons of skips, and last the table."""
    for name, result in results.items():
        for failure in result.failures:
            print(f"\n{name}: FAILED {failure}")
        if result.problem:
            print(f"\n{name}: {result.problem}")
    for name, result in results.items():
        for skip in result.skips:
            print(f"{name}: skipped {skip}")
    print(f"\n{'suite':<16}{'passed':>7}{'failed':>8}{'skipped':>9}")
    for name, result in results.items():
        print(f"{name:<16}{result.row}")


if __name__ == "__main__":
    sys.exit(main())
