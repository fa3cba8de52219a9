"""JSON that is nearly right: a good document in which some places hold what does not belong there.

Hypothesis draws the places and what is put there, so that a failure is shrunk to few faults and small values.
"""

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True, slots=True)
class Text:
    """Stands in a tree for JSON text that no value has, such as 1e999 or a NaN."""

    text: str


class Members(list[tuple[str, Any]]):
    """An object whose keys may repeat."""


DIMS = [0, 1, 2, 3, 16, 64, 65, -1, -2, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40]
NUMBERS = [*DIMS, 255, 256, -129, -(2**31) - 1, -(2**63), -(2**63) - 1, 0.5, 3.0, -0.0, 1e30, 1e308, 5e-324, 65520.0]
WORDS = ["", "a", "0", "1", "NaN", "-Infinity", "true", "zwölf", "日本", "\U0001f600", "\0", "\x7f\x1b", "a\nb", "../x",
         "%00", "INPUT0", "OUTPUT0", "FP32", "BYTES", "x" * 129, "y" * 5000]  # fmt: skip
KEYS = ["id", "inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "Data", "binary_data_size",
        "binary_data", "binary_data_output", "classification", "sequence_id", "sequence_start", "sequence_end",
        "priority", "timeout", "triton_enable_empty_final_response", "triton_x", "shared_memory_region",
        "shared_memory_offset", "shared_memory_byte_size", "model_name", "headers", "__class__", "", "\0"]  # fmt: skip
DATATYPES = ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
             "BF16", "BYTES", "FP8", "fp32", "TYPE_FP32", "STRING", ""]  # fmt: skip
TEXTS = [Text(text) for text in
         ("NaN", "-Infinity", "Infinity", "Inf", "1e999", "-1e999", "1E5", "01", "+1", ".5", "1.", "0x10", "1" * 400,
          "0." + "3" * 400, '"\\ud800"', '"\\ud83d\\ude00"', '"\\udc00\\ud800"', '"\\x41"', '"\\u00"', '"tab\t"', "'a'",
          "nul", "True", "None", "", "//", "/**/1", "\ufeff1")]  # fmt: skip

numbers = st.sampled_from(NUMBERS)
words = st.sampled_from(WORDS) | st.text(max_size=8)
scalars: st.SearchStrategy[Any] = st.none() | st.booleans() | numbers | words | st.sampled_from(TEXTS)


@st.composite
def nests(draw: st.DrawFn) -> Any:
    """A value inside many lists, or inside many objects."""
    value, depth = draw(scalars), draw(st.sampled_from([1, 2, 3, 97, 100, 101, 103, 104, 250, 1100, 3000]))
    opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"data":', "}]")]))
    return Text(opening * depth + dump(value) + closing * depth)


junk: st.SearchStrategy[Any] = st.one_of(
    scalars,
    scalars,
    st.lists(scalars, max_size=3),
    st.builds(Members, st.lists(st.tuples(st.sampled_from(KEYS), scalars), max_size=3)),
    nests(),
    st.builds(lambda value, times: [value] * times, numbers | st.none(), st.sampled_from([17, 1025, 5000])),
)
parameters = st.builds(Members, st.lists(st.tuples(st.sampled_from(KEYS) | words, junk), max_size=4))


@st.composite
def broken(draw: st.DrawFn, document: Any) -> Any:
    """`document` with up to four faults."""
    tree = thaw(document)
    for _ in range(draw(st.integers(0, 4))):
        tree = _FAULTS[draw(st.sampled_from([*_FAULTS]))](draw, tree)
    return tree


def thaw(value: Any) -> Any:
    """A copy that can be changed; objects become Members."""
    if isinstance(value, dict):
        return Members((key, thaw(item)) for key, item in value.items())
    return [thaw(item) for item in value] if isinstance(value, list) else value


def dump(value: Any) -> str:
    if isinstance(value, Text):
        return value.text
    if isinstance(value, Members):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


# -- faults. Each takes a tree and returns it changed; a place is a Members or a list, and an index into it.


def _places(tree: Any) -> list[tuple[Any, int]]:
    """Every place below `tree`; of long lists the first few."""
    found: list[tuple[Any, int]] = []
    if isinstance(tree, list):
        for index, item in enumerate(tree[:4]):
            found.append((tree, index))
            found.extend(_places(item[1] if isinstance(tree, Members) else item))
    return found


def _put(holder: Any, index: int, value: Any) -> None:
    holder[index] = (holder[index][0], value) if isinstance(holder, Members) else value


def _get(holder: Any, index: int) -> Any:
    return holder[index][1] if isinstance(holder, Members) else holder[index]


def _replace(draw: st.DrawFn, tree: Any) -> Any:
    places = _places(tree)
    if not places or draw(st.integers(0, 40)) == 17:
        return draw(junk)
    holder, index = draw(st.sampled_from(places))
    _put(holder, index, draw(junk))
    return tree


def _remove(draw: st.DrawFn, tree: Any) -> Any:
    if places := _places(tree):
        holder, index = draw(st.sampled_from(places))
        del holder[index]
    return tree


def _repeat(draw: st.DrawFn, tree: Any) -> Any:
    """An input twice, a key twice: as it was, or with another value the second time."""
    if places := _places(tree):
        holder, index = draw(st.sampled_from(places))
        holder.append(holder[index])
        if draw(st.booleans()):
            _put(holder, len(holder) - 1, draw(junk))
    return tree


def _rename(draw: st.DrawFn, tree: Any) -> Any:
    if places := [(holder, index) for holder, index in _places(tree) if isinstance(holder, Members)]:
        holder, index = draw(st.sampled_from(places))
        holder[index] = (draw(st.sampled_from(KEYS) | words), holder[index][1])
    return tree


def _wrap(draw: st.DrawFn, tree: Any) -> Any:
    if places := _places(tree):
        holder, index = draw(st.sampled_from(places))
        value = _get(holder, index)
        _put(holder, index, draw(st.sampled_from([[value], [[value]], Members([("a", value)]), [value, value]])))
    return tree


def _tensors(tree: Any) -> list[Members]:
    """Entries of `inputs` and `outputs`, as far as they still are objects."""
    lists = [item for key, item in tree if key in ("inputs", "outputs")] if isinstance(tree, Members) else []
    return [entry for entries in lists if isinstance(entries, list) for entry in entries if isinstance(entry, Members)]


def _set(members: Members, key: str, value: Any) -> None:
    members[:] = [pair for pair in members if pair[0] != key] + [(key, value)]


def _misstate(draw: st.DrawFn, tree: Any) -> Any:
    """Another shape, datatype, or data than the tensor has."""
    if entries := _tensors(tree):
        key, values = draw(
            st.sampled_from(
                [
                    ("shape", st.lists(st.sampled_from(DIMS), max_size=5) | st.just([1] * 33)),
                    ("datatype", st.sampled_from(DATATYPES)),
                    ("data", st.lists(scalars, max_size=32) | st.lists(st.lists(numbers, max_size=3), max_size=3)),
                    ("name", words),
                ]
            )
        )
        _set(draw(st.sampled_from(entries)), key, draw(values))
    return tree


def _parametrize(draw: st.DrawFn, tree: Any) -> Any:
    """Odd parameters of the request, an input, or an output."""
    if isinstance(tree, Members):
        _set(draw(st.sampled_from([tree, *_tensors(tree)])), "parameters", draw(parameters))
    return tree


def _ask(draw: st.DrawFn, tree: Any) -> Any:
    """Odd outputs."""
    if isinstance(tree, Members):
        names = st.sampled_from(["OUTPUT0", "OUTPUT1", "probabilities", "label", "y", "c", ""])
        entry = st.builds(lambda name, given: Members([("name", name), ("parameters", given)]), names, parameters)
        _set(tree, "outputs", draw(st.lists(entry, max_size=3)))
    return tree


_FAULTS = {
    "replace": _replace,
    "remove": _remove,
    "repeat": _repeat,
    "rename": _rename,
    "wrap": _wrap,
    "misstate": _misstate,
    "parametrize": _parametrize,
    "ask": _ask,
}
