"""Equal requests have one key, others have others, and the cache keeps within its size."""

import numpy as np
import pytest
from penstock.cache import ENTRY_BYTES, ResponseCache, fingerprint, key
from penstock.messages import InferRequest, RequestedOutput
from penstock.tensor import BYTES, DATATYPES, FP32, Tensor, objects

from .fakes import configuration

MODEL = fingerprint(configuration(), "1")


def of(*tensors: Tensor, outputs: tuple[RequestedOutput, ...] = (), id: str = "", priority: int = 0) -> bytes:
    wanted = {output.name: output for output in outputs}
    return key(MODEL, InferRequest("m", "", id, {t.name: t for t in tensors}, wanted, {"a": 1}, priority))


def x(*values: float, name: str = "X", datatype: str = "FP32") -> Tensor:
    return Tensor(name, DATATYPES[datatype], np.array(values, DATATYPES[datatype].dtype))


def text(*elements: bytes) -> Tensor:
    return Tensor("T", BYTES, objects(elements, [len(elements)]))


def test_what_changes_no_answer_changes_no_key() -> None:
    assert of(x(1), text(b"a")) == of(text(b"a"), x(1), id="7", priority=3)


def test_whatever_changes_an_answer_changes_the_key() -> None:
    wide = Tensor("X", FP32, np.array([[1, 2]], np.float32))
    keys = [
        of(x(1, 2)),
        of(wide),
        of(x(1, 3)),
        of(x(1, 2, name="Z")),
        of(x(1, 2), x(1, 2, name="Z")),
        of(Tensor("X", DATATYPES["INT32"], np.array([1, 2], np.float32).view(np.int32))),
        of(text(b"ab", b"")),
        of(text(b"a", b"b")),
        of(x(1, 2), outputs=(RequestedOutput("Y"),)),
        of(x(1, 2), outputs=(RequestedOutput("Y", 2),)),
        of(x(1, 2), outputs=(RequestedOutput("Y"), RequestedOutput("W"))),
        of(x(1, 2), outputs=(RequestedOutput("W"), RequestedOutput("Y"))),
    ]
    assert len({*keys}) == len(keys)


def test_models_versions_and_configurations_have_keys_of_their_own() -> None:
    other = configuration()
    other.parameters["a"].string_value = "b"
    assert len({MODEL, fingerprint(configuration(), "2"), fingerprint(other, "1")}) == 3


def test_what_was_put_there_is_found_and_counted() -> None:
    kept = ResponseCache(10_000)
    outputs = [x(1, 2)]
    assert kept.get(b"k") is None
    kept.put(b"k", outputs)
    outputs[0].array[:] = 9  # the cache has a copy
    found = kept.get(b"k")
    assert found is not None
    assert found[0].array.tolist() == [1, 2]
    found.clear()  # and the list is the caller's
    assert len(kept.get(b"k") or []) == 1
    assert (kept.counts.hits, kept.counts.misses, kept.counts.lookup.count, kept.counts.insertion.count) == (2, 1, 3, 1)


def test_the_least_recently_used_makes_room() -> None:
    size = ENTRY_BYTES + 4
    kept = ResponseCache(2 * size)
    for name in (b"a", b"b"):
        kept.put(name, [x(1)])
    kept.get(b"a")
    kept.put(b"c", [x(1)])
    assert [kept.get(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert (kept.used_bytes, len(kept), kept.counts.evictions) == (2 * size, 2, 1)


@pytest.mark.parametrize("tensor", [x(*range(300)), text(b"x" * 960), text(*[b""] * 30)])
def test_what_does_not_fit_at_all_is_not_kept(tensor: Tensor) -> None:
    kept = ResponseCache(ENTRY_BYTES + 1000)
    kept.put(b"small", [x(1)])
    kept.put(b"k", [tensor])
    assert (kept.get(b"k"), len(kept), kept.counts.evictions) == (None, 1, 0)


def test_an_answer_that_is_there_already_is_not_kept_twice() -> None:
    kept = ResponseCache(10_000)
    kept.put(b"k", [x(1)])
    kept.put(b"k", [x(1)])
    assert (len(kept), kept.used_bytes) == (1, ENTRY_BYTES + 4)
