"""The table of clauses: what a run may claim to have proved."""

from pathlib import Path

import pytest

from conformance_tests.clause_table import AS_FOUND, AS_PUBLISHED, Clause, Ledger, Verdict, applicable_to, load

BOTH = Clause("a.both", "holds on both", "OIP", ("http", "grpc"))
ONE = Clause("a.one", "holds on one", "Penstock", ("http",))


def ledger() -> Ledger:
    return Ledger({entry.id: entry for entry in (BOTH, ONE)})


def test_every_clause_of_the_file_is_well_formed() -> None:
    clauses = load()
    assert all(entry.text and entry.text[-1] != "." for entry in clauses.values())
    assert len({(entry.area, entry.text) for entry in clauses.values()}) == len(clauses)


def test_an_unknown_protocol_in_the_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "clauses.toml"
    file.write_text('[a]\nb = { source = "OIP", protocols = ["smtp"], text = "t" }\n')
    with pytest.raises(pytest.UsageError, match=r"'a\.b' has an unknown source or protocol"):
        load(file)


def test_a_clause_is_proved_only_over_each_of_its_protocols() -> None:
    book = ledger()
    book.record(["a.both"], ["http"], Verdict.PROVED, "t1")
    assert book.overall(BOTH) is Verdict.UNTESTED
    book.record(["a.both"], ["grpc"], Verdict.PROVED, "t2")
    assert book.overall(BOTH) is Verdict.PROVED


def test_one_failure_outweighs_every_pass() -> None:
    book = ledger()
    for verdict in (Verdict.PROVED, Verdict.FAILED, Verdict.PROVED):
        book.record(["a.one"], ["http"], verdict, "t1")
    assert book.overall(ONE) is Verdict.FAILED
    assert "  a.one (Penstock): holds on one" in book.summary()
    assert "      t1" in book.summary()


def test_a_skipped_test_proves_nothing() -> None:
    book = ledger()
    book.record(["a.both", "a.one"], ["http"], Verdict.SKIPPED, "t1")
    book.record(["a.both"], ["http"], Verdict.PROVED, "t2")
    book.record(["a.both"], ["grpc"], Verdict.SKIPPED, "t3")
    assert book.overall(ONE) is book.overall(BOTH) is Verdict.SKIPPED
    assert book.summary()[-2:] == ["skipped:", "  a: both (grpc), one"]


def test_the_summary_names_what_is_left() -> None:
    book = ledger()
    book.record(["a.both"], ["http"], Verdict.PROVED, "t1")
    assert book.summary()[-2:] == ["not yet tested:", "  a: both (grpc), one"]


def test_the_markdown_has_a_row_per_clause() -> None:
    book = ledger()
    book.record(["a.both", "a.one"], ["http"], Verdict.PROVED, "t1")
    rows = book.markdown(AS_FOUND).splitlines()
    assert "2 clauses: 1 proved, 1 not yet tested." in rows
    assert "| `a.both` | holds on both | OIP | HTTP, gRPC | HTTP: proved; gRPC: not yet tested |" in rows
    assert "| `a.one` | holds on one | Penstock | HTTP | proved |" in rows


def test_what_is_published_is_the_same_where_a_machine_skips_a_test() -> None:
    here, there = ledger(), ledger()
    here.record(["a.one"], ["http"], Verdict.PROVED, "t1")
    there.record(["a.one"], ["http"], Verdict.SKIPPED, "t1")
    assert here.markdown(AS_PUBLISHED) == there.markdown(AS_PUBLISHED)
    assert here.document() == {
        "a.both": {"http": "not yet tested", "grpc": "not yet tested"},
        "a.one": {"http": "proved"},
    }


@pytest.mark.parametrize(
    ("carrier", "applicable"),
    [("http-json", ("a.both", "a.one")), ("http-binary", ("a.one", "binary.same_meaning")), ("", ("a.both", "a.one"))],
)
def test_a_carrier_of_tritons_says_nothing_about_the_protocols_own_clauses(
    carrier: str, applicable: tuple[str, ...]
) -> None:
    assert applicable_to(carrier, ("a.both", "a.one"), ledger().clauses) == applicable
