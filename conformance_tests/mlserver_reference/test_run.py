"""What is said about MLServer: no failure of the protocol's own clauses goes unexplained."""

import tomllib

from conformance_tests.clause_table import Clause, load
from conformance_tests.mlserver_reference.run import HERE, failing, models, page

OWN = Clause("a.own", "holds everywhere", "OIP", ("http", "grpc"))
OTHER = Clause("a.other", "holds there", "Triton", ("http",))
CLAUSES = {entry.id: entry for entry in (OWN, OTHER)}


def test_a_clause_of_the_protocol_that_fails_over_one_door_fails() -> None:
    verdicts = {"a.own": {"http": "proved", "grpc": "failed"}, "a.other": {"http": "failed"}}
    assert failing(CLAUSES, verdicts) == {"a.own"}
    rows = page(CLAUSES, verdicts, {"a.own": "does otherwise"}).splitlines()
    assert "| `a.own` | holds everywhere | gRPC | does otherwise |" in rows
    assert "Of the protocol's 1 clauses it passes 0 and fails 1." in rows


def test_a_clause_that_passes_is_listed_as_such() -> None:
    verdicts = {"a.own": {"http": "proved", "grpc": "proved"}, "a.other": {"http": "failed"}}
    assert failing(CLAUSES, verdicts) == set()
    assert "| `a.own` | holds everywhere | HTTP, gRPC |" in page(CLAUSES, verdicts, {}).splitlines()


def test_a_clause_proved_over_one_door_alone_is_not_tested() -> None:
    verdicts = {"a.own": {"http": "proved", "grpc": "skipped"}, "a.other": {"http": "failed"}}
    assert "- `a.own`: holds everywhere" in page(CLAUSES, verdicts, {}).splitlines()


def test_only_clauses_of_the_protocol_are_explained() -> None:
    explained = tomllib.loads((HERE / "differences.toml").read_text(encoding="utf-8"))
    assert {load()[name].source for name in explained} == {"OIP"}


def test_models_of_one_name_differ_in_version() -> None:
    served = [(entry["name"], entry["parameters"]["version"]) for entry in models()]
    assert len({*served}) == len(served)
