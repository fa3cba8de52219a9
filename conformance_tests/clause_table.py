"""Pytest plugin: binds tests to the clauses of clauses.toml and ends the run with the table of clauses.

A test names what it proves, `@clause("classification.topk")`, and counts for the protocols that it speaks: those of
its `over` marker, or the one of its carrier, or those that its fixtures are named after (`http`, `grpc_address`).
A clause is proved over a protocol by a test that passed and none that failed; a skipped test proves nothing. What a
carrier of Triton's does says nothing about a clause of the Open Inference Protocol: see `BEYOND_OIP`.
"""

import json
import tomllib
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

CLAUSES = Path(__file__).with_name("clauses.toml")
SOURCES = ("OIP", "Triton", "Penstock")
PROTOCOLS = ("http", "grpc", "process")
# Carriers that the Open Inference Protocol does not have, and the clause that such a test proves in place of OIP's.
BEYOND_OIP = {"http-binary": "binary.same_meaning"}
FOLD = 14  # as many untested clauses of one area are named before the rest are only counted

clause = pytest.mark.clause


@dataclass(frozen=True, slots=True)
class Clause:
    """One rule of the protocol. Its area is the part of the id before the first dot."""

    id: str
    text: str
    source: str  # one of SOURCES: the specification, Triton's extensions to it, or ours
    protocols: tuple[str, ...]  # of PROTOCOLS; `process` is what shows outside both, such as the exit status

    @property
    def area(self) -> str:
        return self.id.partition(".")[0]


class Verdict(Enum):
    """What the tests of a clause say, over one protocol or over all of them."""

    PROVED = "proved"
    SKIPPED = "skipped"
    UNTESTED = "not yet tested"
    FAILED = "failed"


def load(path: Path = CLAUSES) -> dict[str, Clause]:
    """The clauses by id, in the file's order. Raises pytest.UsageError where the file breaks its own rules."""
    clauses: dict[str, Clause] = {}
    for area, entries in tomllib.loads(path.read_text(encoding="utf-8")).items():
        for name, entry in entries.items():
            loaded = Clause(f"{area}.{name}", entry["text"], entry["source"], tuple(entry["protocols"]))
            if loaded.source not in SOURCES or not loaded.protocols or not {*loaded.protocols} <= {*PROTOCOLS}:
                raise pytest.UsageError(f"{path.name}: '{loaded.id}' has an unknown source or protocol")
            clauses[loaded.id] = loaded
    return clauses


@dataclass(slots=True)
class Ledger:
    """What the tests of a run said about each clause, per protocol."""

    clauses: Mapping[str, Clause]
    verdicts: defaultdict[tuple[str, str], list[Verdict]] = field(default_factory=lambda: defaultdict(list))
    failures: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def record(self, ids: Iterable[str], protocols: Iterable[str], verdict: Verdict, test: str) -> None:
        """Enter the outcome of one test under every clause and protocol that it speaks for."""
        for clause_id in ids:
            for protocol in protocols:
                self.verdicts[clause_id, protocol].append(verdict)
            if verdict is Verdict.FAILED:
                self.failures[clause_id].append(test)

    def verdict(self, clause_id: str, protocol: str) -> Verdict:
        """One failure fails; else one pass proves; tests that were all skipped say nothing, like tests that are not."""
        said = self.verdicts.get((clause_id, protocol), [])
        return next(
            (each for each in (Verdict.FAILED, Verdict.PROVED, Verdict.SKIPPED) if each in said), Verdict.UNTESTED
        )

    def overall(self, clause: Clause) -> Verdict:
        """Over all its protocols: a clause is proved where it is proved over each of them."""
        said = {self.verdict(clause.id, protocol) for protocol in clause.protocols}
        worst = (Verdict.FAILED, Verdict.UNTESTED, Verdict.SKIPPED, Verdict.PROVED)
        return next(verdict for verdict in worst if verdict in said)

    def summary(self) -> list[str]:
        """Counts per area, then every clause that failed, then by area those skipped and those not yet tested."""
        areas: dict[str, Counter[Verdict]] = defaultdict(Counter)
        for entry in self.clauses.values():
            areas[entry.area][self.overall(entry)] += 1
        total = sum(areas.values(), Counter())
        lines = [f"{'area':<20}" + "".join(f"{verdict.value:>16}" for verdict in Verdict)]
        for area, counts in (*areas.items(), ("all", total)):
            lines.append(f"{area:<20}" + "".join(f"{counts[verdict] or '-':>16}" for verdict in Verdict))
        failed = [entry for entry in self.clauses.values() if self.overall(entry) is Verdict.FAILED]
        if failed:
            lines += ["", "failed:"]
        for entry in failed:
            lines.append(f"  {entry.id} ({entry.source}): {entry.text}")
            lines += [f"      {test}" for test in self.failures[entry.id]]
        for verdict in (Verdict.SKIPPED, Verdict.UNTESTED):
            left: dict[str, list[str]] = defaultdict(list)
            for entry in self.clauses.values():
                if self.overall(entry) is verdict:
                    left[entry.area].append(self._what_is_left(entry, verdict))
            if left:
                lines += ["", f"{verdict.value}:"]
            for area, names in left.items():
                more = f" and {len(names) - FOLD} more" if len(names) > FOLD else ""
                lines.append(f"  {area}: {', '.join(names[:FOLD])}{more}")
        return lines

    def _what_is_left(self, clause: Clause, verdict: Verdict) -> str:
        name = clause.id.partition(".")[2]
        left = [protocol for protocol in clause.protocols if self.verdict(clause.id, protocol) is verdict]
        return name if len(left) == len(clause.protocols) else f"{name} ({', '.join(left)})"

    def document(self) -> dict[str, dict[str, str]]:
        """The verdicts as JSON: clause, then protocol."""
        return {
            entry.id: {protocol: self.verdict(entry.id, protocol).value for protocol in entry.protocols}
            for entry in self.clauses.values()
        }

    def markdown(self, states: Mapping[Verdict, str], *about: str) -> str:
        """The whole table, one row per clause, each verdict in the words of `states`."""
        counts = Counter(states[self.overall(entry)] for entry in self.clauses.values())
        counted = ", ".join(f"{counts[state]} {state}" for state in dict.fromkeys(states.values()) if counts[state])
        lines = ["# Clauses", "", *ABOUT, *about, "", f"{len(self.clauses)} clauses: {counted}."]
        area = ""
        for entry in self.clauses.values():
            if entry.area != area:
                area = entry.area
                first, *rest = area.split("_")
                heading = " ".join([WRITTEN.get(first, first.capitalize()), *rest])
                lines += [
                    "",
                    f"## {heading}",
                    "",
                    "| Clause | What it says | Source | Over | State |",
                    "|---|---|---|---|---|",
                ]
            said = {protocol: states[self.verdict(entry.id, protocol)] for protocol in entry.protocols}
            state = "; ".join(f"{NAMES[protocol]}: {word}" for protocol, word in said.items())
            if len({*said.values()}) == 1:
                state = said[entry.protocols[0]]
            text = entry.text.replace("|", "\\|")
            over = ", ".join(NAMES[protocol] for protocol in entry.protocols)
            lines.append(f"| `{entry.id}` | {text} | {entry.source} | {over} | {state} |")
        return "\n".join(lines) + "\n"


NAMES = {"http": "HTTP", "grpc": "gRPC", "process": "process"}
WRITTEN = NAMES | {"json": "JSON", "cuda": "CUDA"}
ABOUT = (
    "Every rule that the conformance tests hold a server to, in our words, and whose rule it is: **OIP**, the Open",
    "Inference Protocol; **Triton**, its extensions, and its form where the protocol leaves one open; **Penstock**,",
    "where it adds something or differs from both on purpose.",
)
PUBLISHED = ("Penstock passes the tests of every rule that is *tested*. `make clauses` writes this page.",)
AS_FOUND = {verdict: verdict.value for verdict in Verdict}
# Of our own server, whose models are all there: a test is skipped only for want of a device or a program on the machine
# that writes the table, and the table is to be the same on every machine.
AS_PUBLISHED = AS_FOUND | {Verdict.PROVED: "tested", Verdict.SKIPPED: "tested"}
LEDGER = pytest.StashKey[Ledger]()
NEEDS_A_CLAUSE = {"target", "broken", "process"}  # fixtures that are a server
SPEAKS = ("carrier", "door", "broken_door")  # fixtures whose parameter is a protocol, or begins with one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clauses-out", metavar="FILE", help="write the table of clauses to FILE: JSON or Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(*ids): the clauses of clauses.toml that the test proves")
    config.addinivalue_line("markers", "over(*protocols): what the test speaks, where its fixtures do not tell")
    config.stash[LEDGER] = Ledger(load())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Raises pytest.UsageError for a test with no clause, an unknown one, or one that its protocol does not have."""
    clauses = config.stash[LEDGER].clauses
    faults = []
    for item in items:
        ids = clauses_of(item, clauses)
        if not ids and NEEDS_A_CLAUSE & {*getattr(item, "fixturenames", ())}:
            faults.append(f"{item.nodeid} names no clause")
        for clause_id in ids:
            if clause_id not in clauses:
                faults.append(f"{item.nodeid} names the unknown clause '{clause_id}'")
                continue
            stray = protocols_of(item) - {*clauses[clause_id].protocols}
            faults += [f"{item.nodeid} runs over {name}, where '{clause_id}' does not apply" for name in stray]
    if faults:
        raise pytest.UsageError("\n".join(faults))


def clauses_of(item: pytest.Item, clauses: Mapping[str, Clause]) -> tuple[str, ...]:
    """Each clause once, however often the markers of test, class and module repeat it, and only where it applies."""
    named = tuple(dict.fromkeys(str(name) for marker in item.iter_markers("clause") for name in marker.args))
    callspec: Any = getattr(item, "callspec", None)
    return applicable_to(callspec.params.get("carrier", "") if callspec is not None else "", named, clauses)


def applicable_to(carrier: str, named: tuple[str, ...], clauses: Mapping[str, Clause]) -> tuple[str, ...]:
    """The clauses that a test speaks for over a carrier, "" for none: see `BEYOND_OIP`."""
    left = tuple(name for name in named if name not in clauses or clauses[name].source != "OIP")
    return (*left, BEYOND_OIP[carrier]) if carrier in BEYOND_OIP and left != named else named


def protocols_of(item: pytest.Item) -> frozenset[str]:
    """`http` of the carrier http-json and of the fixture http_address, and so on."""
    if (marker := item.get_closest_marker("over")) is not None:
        return frozenset(str(protocol) for protocol in marker.args)
    callspec: Any = getattr(item, "callspec", None)
    spoken = [callspec.params[name] for name in SPEAKS if name in callspec.params] if callspec is not None else []
    if spoken:
        return frozenset(str(value).partition("-")[0] for value in spoken)
    return frozenset(PROTOCOLS) & {name.partition("_")[0] for name in getattr(item, "fixturenames", ())}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed or report.skipped or report.when == "call":
        verdict = (
            Verdict.FAILED if report.failed else Verdict.SKIPPED if report.skipped else Verdict.PROVED
        )  # a failure in setup or teardown counts as well
        ledger = item.config.stash[LEDGER]
        ledger.record(clauses_of(item, ledger.clauses), protocols_of(item), verdict, item.nodeid)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ledger = config.stash[LEDGER]
    if ledger.verdicts:
        terminalreporter.section("clauses")
        for line in ledger.summary():
            terminalreporter.write_line(line)
    if out := config.getoption("--clauses-out"):
        if Path(out).suffix == ".json":
            text = json.dumps(ledger.document())
        elif config.getoption("--url", None):
            text = ledger.markdown(AS_FOUND)
        elif ledger.failures:
            terminalreporter.write_line(f"{out} is not written: clauses failed")
            return
        else:
            text = ledger.markdown(AS_PUBLISHED, *PUBLISHED)
        Path(out).write_text(text, encoding="utf-8")
        terminalreporter.write_line(f"the table of clauses is in {out}")
