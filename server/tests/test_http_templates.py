"""Inferences over HTTP that are known by their JSON, and the JSON of their answers."""

import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock import oip_json
from penstock.errors import ServingError
from penstock.http_api.templates import KEPT, KEY_BYTES, Heads, Templates
from penstock.messages import InferRequest, InferResponse
from penstock.model import Model
from penstock.oip_json import Forms, Limits
from penstock.tensor import BYTES, DATATYPES, FP32, Tensor, objects

from .test_http_api import Doubler, model

LIMITS = Limits(1 << 20, 10, 10)
INT32 = DATATYPES["INT32"]


def binary(*values: int, **members: Any) -> tuple[bytes, int]:
    """A body, and how much of it is JSON."""
    entry = {
        "name": "A",
        "shape": [len(values)],
        "datatype": "INT32",
        "parameters": {"binary_data_size": 4 * len(values)},
    }
    json = orjson.dumps({**members, "inputs": [entry]})
    return json + struct.pack(f"<{len(values)}i", *values), len(json)


def decoded(to: Model, body: bytes, json_bytes: int) -> tuple[oip_json.Decoded, InferRequest]:
    made = oip_json.decode(to.signature, body, json_bytes, LIMITS)
    return made, made.admitted(to.signature, to.version)


def learnt(known: Templates, to: Model, body: bytes, json_bytes: int) -> InferRequest | None:
    """What the body is known as once it has been seen."""
    known.learn(to, body, json_bytes, *decoded(to, body, json_bytes))
    found = known.read(to, body, json_bytes)
    return found[0] if found else None


def plain(request: InferRequest | None) -> object:
    if request is None:
        return None
    arrays = {
        name: (one.datatype.name, one.array.dtype.str, one.array.tolist()) for name, one in request.inputs.items()
    }
    return (request.model, request.version, request.id, arrays, request.outputs, request.parameters, request.priority,
            request.timeout_us, request.rows, request.sequence)  # fmt: skip


@pytest.fixture(scope="module")
def to() -> Model:
    return model("m", Doubler())


def test_a_second_request_is_known_whatever_its_id_and_data(to: Model) -> None:
    known = Templates(1000)
    members: dict[str, Any] = {
        "outputs": [{"name": "Y", "parameters": {"binary_data": True}}],
        "parameters": {"priority": 2, "timeout": 9},
    }
    first = binary(1, 2, id="first", **members)
    assert known.read(to, *first) is None
    assert plain(learnt(known, to, *first)) == plain(decoded(to, *first)[1])
    for id in ("second", "x" * 500):
        body, json_bytes = binary(3, 4, id=id, **members)
        found = known.read(to, body, json_bytes)
        assert found is not None
        made, request = decoded(to, body, json_bytes)
        assert plain(found[0]) == plain(request)
        assert found[1] == made.forms
        assert np.shares_memory(found[0].inputs["A"].array, np.frombuffer(body, np.uint8))


def test_what_others_like_it_have_shown_is_not_looked_for_again(to: Model) -> None:
    known = Templates(1000)
    for classes, may_classify in ((0, False), (1, True)):
        parameters: dict[str, Any] = {"binary_data": True} | ({"classification": classes} if classes else {})
        request = learnt(known, to, *binary(1, 2, outputs=[{"name": "Y", "parameters": parameters}]))
        assert request is not None
        assert (request.size, request.may_classify) == (8, may_classify)


def test_requests_with_an_empty_id_are_known_from_the_second_on(to: Model) -> None:
    known = Templates(1000)
    learnt(known, to, *binary(1, 2, id="plain"))
    assert known.read(to, *binary(3, 4, id="")) is None
    learnt(known, to, *binary(3, 4, id=""))
    for id in ("", "plain", "another"):
        body, json_bytes = binary(5, 6, id=id)
        found = known.read(to, body, json_bytes)
        assert found is not None
        assert plain(found[0]) == plain(decoded(to, body, json_bytes)[1])


@pytest.mark.parametrize("id", ['quo"te', "back\\slash", "umläut", "new\nline", "\x7f"])
def test_an_id_that_json_writes_otherwise_is_read_as_json(to: Model, id: str) -> None:
    known = Templates(1000)
    learnt(known, to, *binary(1, 2, id="plain"))
    body, json_bytes = binary(3, 4, id=id)
    found = known.read(to, body, json_bytes)
    assert found is None
    request = learnt(known, to, body, json_bytes)  # known by all of its bytes
    assert request is not None
    assert request.id == id


@pytest.mark.parametrize("more", [b'"id":"b",', b'"\\u0069d":"b",'])
def test_a_second_id_counts_as_it_does_in_json(to: Model, more: bytes) -> None:
    known = Templates(1000)
    body, json_bytes = binary(1, 2, id="b")
    twice = body.replace(b'"inputs"', more + b'"inputs"')
    assert learnt(known, to, twice, json_bytes + len(more)) is None
    other = twice.replace(b'{"id":"b"', b'{"id":"a"')
    assert known.read(to, other, json_bytes + len(more)) is None


def test_data_that_is_not_what_was_promised_is_left_to_the_checks(to: Model) -> None:
    known = Templates(1000)
    body, json_bytes = binary(1, 2)
    learnt(known, to, body, json_bytes)
    assert known.read(to, body[:-1], json_bytes) is None
    assert known.read(to, body + b"x", json_bytes) is None
    assert known.read(to, body, json_bytes - 1) is None


@pytest.mark.parametrize(
    "members", [{"parameters": {"p": 1}}, {"parameters": {"sequence_id": 1}}, {"x": "y" * KEY_BYTES}]
)
def test_requests_that_depend_on_more_than_their_json_are_not_learnt(to: Model, members: dict[str, Any]) -> None:
    assert learnt(Templates(1 << 20), to, *binary(1, 2, **members)) is None


def test_json_over_the_limit_is_never_known(to: Model) -> None:
    body, json_bytes = binary(1, 2)
    assert learnt(Templates(json_bytes - 1), to, body, json_bytes) is None
    assert learnt(Templates(json_bytes), to, body, json_bytes) is not None


def test_a_model_that_was_loaded_anew_makes_its_requests_unknown(to: Model) -> None:
    known = Templates(1000)
    body, json_bytes = binary(1, 2)
    assert learnt(known, to, body, json_bytes) is not None
    assert known.read(model("m", Doubler()), body, json_bytes) is None
    assert known.read(model("other", Doubler()), body, json_bytes) is None


def test_what_is_known_stays_bounded(to: Model) -> None:
    known = Templates(1 << 20)
    for size in range(1, KEPT + 10):
        learnt(known, to, *binary(*range(size)))
    assert len(known._known) <= KEPT


IDS = st.text(max_size=4) | st.sampled_from(["a", "b", '"', "\\", "id"])
MEMBERS = st.dictionaries(st.sampled_from(["id", "x", "parameters"]), IDS | st.just({}) | st.just({"priority": 1}))


@settings(deadline=None)
@given(st.lists(st.tuples(IDS, MEMBERS, st.sampled_from([b"", b" ", b'"id":"z",', b"\\"])), max_size=6))
def test_whatever_is_known_is_what_json_says(cases: list[tuple[str, dict[str, Any], bytes]]) -> None:
    to, known = ANY, Templates(1 << 20)
    for id, members, inserted in cases:
        body, json_bytes = binary(1, 2, id=id, **{key: value for key, value in members.items() if key != "id"})
        body, json_bytes = body.replace(b'"inputs"', inserted + b'"inputs"', 1), json_bytes + len(inserted)
        found = known.read(to, body, json_bytes)
        try:
            made, request = decoded(to, body, json_bytes)
        except ServingError:
            assert found is None
            continue
        if found:
            assert plain(found[0]) == plain(request)
        known.learn(to, body, json_bytes, made, request)


ANY = model("m", Doubler())


def response(*outputs: Tensor, id: str = "", **parameters: int) -> InferResponse:
    return InferResponse("m", "1", id, list(outputs), dict(parameters))


Y = Tensor("Y", INT32, np.arange(6, dtype=np.int32).reshape(2, 3))
RESPONSES = [
    response(Y),
    response(Y, id="a"),
    response(Y, id='quo"te ä'),
    response(Y, Tensor("Z", FP32, np.zeros(1000, np.float32))),
    response(Tensor("Y", INT32, Y.array.T)),
    response(Tensor("Y", INT32, Y.array.astype(np.int64))),
    response(Tensor("Y", INT32, np.zeros((0, 3), np.int32))),
    response(Y, p=1),
    response(Tensor("Y", BYTES, objects([b"abc", b""], [2]))),
    response(),
]


def test_answers_are_written_as_they_are_where_nothing_is_known() -> None:
    heads = Heads()
    for forms in (Forms(default=True), Forms(named={"Y": True}), Forms(True, {"Z": False}), Forms()) * 2:
        for one in RESPONSES:
            json_bytes, buffers = heads.encode(one, forms, "string")
            expected_bytes, expected = oip_json.encode(one, forms, "string")
            assert (json_bytes, b"".join(buffers)) == (expected_bytes, b"".join(expected))
