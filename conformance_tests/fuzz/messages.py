"""ModelInferRequests that protobuf reads and that make no sense."""

from collections.abc import Callable
from random import Random
from typing import Any

from conformance_tests.fuzz.calls import CALLS, message
from conformance_tests.fuzz.cases import GrpcCase
from conformance_tests.fuzz.documents import DATATYPES, KEYS, WORDS
from conformance_tests.fuzz.mutation import INFER, varint

DIMS = [0, 1, 2, 3, 16, 65, -1, -2, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)]
VERSIONS = ["1", "2", "0", "01", "-1", "x", "9" * 30, "\0", "1.0"]
VALUES: dict[str, list[Any]] = {
    "bool_param": [False, True],
    "int64_param": [0, 1, -1, 3, 2**63 - 1, -(2**63)],
    "string_param": WORDS,
    "double_param": [0.0, 0.5, float("nan"), float("inf"), -1e308],
    "uint64_param": [0, 1, 2**63, 2**64 - 1],
}
CONTENTS: dict[str, list[Any]] = {
    "bool_contents": [True, False],
    "int_contents": [0, 1, -1, 300, 2**31 - 1],
    "int64_contents": [0, -1, 2**63 - 1],
    "uint_contents": [0, 300, 2**32 - 1],
    "uint64_contents": [0, 2**64 - 1],
    "fp32_contents": [0.0, float("nan"), 1e30],
    "fp64_contents": [0.0, float("inf"), 1e308],
    "bytes_contents": [b"", b"a", b"\xff\xfe", b"x" * 1000],
}


def infer_messages(random: Random) -> GrpcCase:
    """A good message after one to four faults."""
    made = message(random.choice(CALLS), typed=random.random() < 0.5)
    for _ in range(random.choice((1, 1, 2, 4))):
        random.choice(_FAULTS)(random, made)
    data: bytes = made.SerializeToString(deterministic=True)
    if random.random() < 0.2:
        data += random.choice(_UNKNOWN)(random)
    return GrpcCase(INFER, data)


def _shape(random: Random, made: Any) -> None:
    if made.inputs:
        shape = random.choice(made.inputs).shape
        if shape and random.random() < 0.6:
            shape[random.randrange(len(shape))] = random.choice(DIMS)
        else:
            shape[:] = [random.choice(DIMS) for _ in range(random.choice((0, 1, 2, 3, 4, 33, 70)))]


def _raw(random: Random, made: Any) -> None:
    """One raw entry too many or too few, a longer or shorter one, or two of them exchanged."""
    raw = made.raw_input_contents
    at = random.randrange(len(raw)) if raw else 0
    match random.randrange(5):
        case 0:
            raw.append(random.randbytes(random.choice((0, 1, 4, 64))))
        case 1 if raw:
            del raw[at]
        case 2 if raw:
            raw[at] = raw[at][: random.randrange(len(raw[at]) + 1)]
        case 3 if raw:
            raw[at] += random.randbytes(random.choice((1, 3, 4)))
        case 4 if raw:
            raw[at], raw[0] = raw[0], raw[at]


def _contents(random: Random, made: Any) -> None:
    """Some of a typed list, whether or not there is another one, or raw contents."""
    if made.inputs:
        contents = random.choice(made.inputs).contents
        contents.SetInParent()
        name = random.choice([*CONTENTS])
        elements = getattr(contents, name)
        if len(elements) and random.random() < 0.5:
            del elements[random.randrange(len(elements))]
        else:
            elements.extend(random.choices(CONTENTS[name], k=random.choice((0, 1, 6, 16, 32))))


def _parameters(random: Random, made: Any) -> None:
    holder = random.choice([made, made, *made.inputs, *made.outputs])
    for _ in range(random.choice((1, 1, 3))):
        parameter = holder.parameters[random.choice(KEYS + WORDS)]
        parameter.Clear()
        if kind := random.choice(["", *VALUES]):
            setattr(parameter, kind, random.choice(VALUES[kind]))


def _names(random: Random, made: Any) -> None:
    holder, field = random.choice(
        [(made, "model_name"), (made, "id"), *((tensor, "name") for tensor in (*made.inputs, *made.outputs))]
    )
    setattr(holder, field, random.choice([*WORDS, "simple", "identity_bytes", "OUTPUT1"]))


def _version(random: Random, made: Any) -> None:
    made.model_version = random.choice(VERSIONS)


def _datatype(random: Random, made: Any) -> None:
    if made.inputs:
        random.choice(made.inputs).datatype = random.choice(DATATYPES)


def _repeat(random: Random, made: Any) -> None:
    entries = random.choice((made.inputs, made.outputs))
    if entries:
        entries.add().CopyFrom(random.choice(entries))


def _drop(random: Random, made: Any) -> None:
    entries = random.choice((made.inputs, made.outputs))
    if entries:
        del entries[random.randrange(len(entries))]


def _ask(random: Random, made: Any) -> None:
    asked = made.outputs.add(name=random.choice(["OUTPUT0", "OUTPUT1", "probabilities", "y", ""]))
    if random.random() < 0.5:
        asked.parameters["classification"].int64_param = random.choice((0, 1, -1, 3, 2**31, 2**63 - 1))


_FAULTS: tuple[Callable[[Random, Any], None], ...] = (
    _shape,
    _shape,
    _raw,
    _raw,
    _contents,
    _contents,
    _parameters,
    _parameters,
    _names,
    _version,
    _datatype,
    _repeat,
    _drop,
    _ask,
)


def _key(random: Random, wire_type: int) -> bytes:
    return varint(random.choice((0, 1, 6, 8, 15, 16, 999, 19_000, 2**29 - 1, 2**29)) << 3 | wire_type)


# Fields that no contract knows, or of another wire type than it says; groups may be deep, open, or closed unopened.
_UNKNOWN: tuple[Callable[[Random], bytes], ...] = (
    lambda random: _key(random, 0) + varint(random.choice((0, 1, 2**64 - 1))),
    lambda random: _key(random, 0) + b"\xff" * random.choice((1, 9, 10, 11)) + b"\x01",
    lambda random: _key(random, 1) + random.randbytes(random.choice((8, 8, 3))),
    lambda random: _key(random, 2) + varint(random.choice((0, 3, 2**31, 2**63))) + b"abc",
    lambda random: _key(random, 5) + random.randbytes(random.choice((4, 4, 2))),
    lambda random: b"\x9b\x06" * (depth := random.choice((1, 50, 99, 101, 5000))) + b"\x9c\x06" * depth,
    lambda random: b"\x9b\x06" * random.choice((1, 200)),
    lambda random: b"\x9c\x06",
    lambda random: _key(random, random.choice((6, 7))),
    lambda random: b"\x0a\x02\xff\xfe",  # a model's name that is no UTF-8
)
