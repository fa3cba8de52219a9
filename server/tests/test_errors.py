"""Errors cross threads and processes."""

import pickle

from penstock.errors import Kind, ServingError


def test_an_error_is_its_message_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ServingError(Kind.TIMED_OUT, "too late")))
    assert (type(error), error.kind, error.message, str(error)) == (
        ServingError,
        Kind.TIMED_OUT,
        "too late",
        "too late",
    )


def test_kinds_print_as_the_repository_index_names_them() -> None:
    assert [Kind.INVALID.title, Kind.NOT_FOUND.title, Kind.INTERNAL.title, Kind.EXISTS.title] == [
        "Invalid argument",
        "Not found",
        "Internal",
        "Already exists",
    ]
