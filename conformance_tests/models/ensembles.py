"""Ensembles for tests: graphs of the sample models and of other fixtures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto

from .graphs import Directory, graph, node, tensor

INTS = "TYPE_INT32 16"
FLOATS = "TYPE_FP32 -1 -1"
TEXT = "TYPE_STRING 1"


@dataclass(frozen=True, slots=True)
class Step:
    """A model, and the ensemble tensors that its inputs read and its outputs write."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    version: int = -1


def ensemble(
    name: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    steps: Sequence[Step],
    more: str = "",
    scheduling: str = "",
) -> Directory:
    """A model directory. Tensors are such as "TYPE_FP32 -1 3". Its version directory holds nothing of use."""
    lines = ['platform: "ensemble"', more]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor_name, (datatype, *dims) in ((key, text.split()) for key, text in tensors.items()):
            lines.append(f'{kind} {{ name: "{tensor_name}" data_type: {datatype} dims: [ {", ".join(dims)} ] }}')
    lines.append(f"ensemble_scheduling {{ {scheduling}")
    for step in steps:
        lines.append(f'  step {{ model_name: "{step.model}" model_version: {step.version}')
        for kind, tensors in (("input_map", step.inputs), ("output_map", step.outputs)):
            lines += [f'    {kind} {{ key: "{key}" value: "{value}" }}' for key, value in tensors.items()]
        lines.append("  }")
    lines.append("}")
    return Directory(name, {"config.pbtxt": "\n".join([*lines, ""]), "1/.keep": ""})


def _simple(left: str, right: str, total: str, difference: str) -> Step:
    return Step("simple", {"INPUT0": left, "INPUT1": right}, {"OUTPUT0": total, "OUTPUT1": difference})


def make_ensembles(directory: Path) -> None:
    """Write ensembles that load beside the sample models and the other fixtures.

    - ensemble_chain: LEFT, RIGHT → TWICE_LEFT, TWICE_RIGHT, INT32 [batch,16], by `simple` twice
    - ensemble_nested: LEFT, RIGHT → SUM, DIFFERENCE of both doubled, by ensemble_chain and then `simple`
    - ensemble_cached: LEFT, RIGHT → SUM by `simple`, with the response cache
    - ensemble_of_cached: FP32 INPUT0 → OUTPUT0 = -INPUT0 [rows,columns] by `cached`, which has the response cache
    - sum_of_two: no ensemble: FP32 OUTPUT0 = INPUT0 + INPUT1 [rows,columns]
    - ensemble_diamond: FP32 INPUT0 [1,columns] → OUTPUT0 = 2 · INPUT0, the sum of what slow_rows_sharing and
      slow_rows_sharing_too give; they take batches of one, where the ensemble itself has no batch axis
    - ensemble_failing: INT64 INDEX [length] → FP32 VALUE by `failing`, and COPY by identity_1d_int64
    - ensemble_digits: `digits` under other names: the labels are its
    """
    both = {"LEFT": INTS, "RIGHT": INTS}
    first, second = (
        _simple("LEFT", "RIGHT", "sum", "difference"),
        _simple("sum", "difference", "TWICE_LEFT", "TWICE_RIGHT"),
    )
    twice = {"TWICE_LEFT": INTS, "TWICE_RIGHT": INTS}
    ensemble("ensemble_chain", both, twice, [first, second], "max_batch_size: 8").write(directory)
    chain = Step("ensemble_chain", {"LEFT": "LEFT", "RIGHT": "RIGHT"}, {"TWICE_LEFT": "left", "TWICE_RIGHT": "right"})
    results = {"SUM": INTS, "DIFFERENCE": INTS}
    last = _simple("left", "right", "SUM", "DIFFERENCE")
    ensemble("ensemble_nested", both, results, [last, chain], "max_batch_size: 4").write(directory)
    kept = "max_batch_size: 8 response_cache { enable: true }"
    only = Step("simple", {"INPUT0": "LEFT", "INPUT1": "RIGHT"}, {"OUTPUT0": "SUM"})
    ensemble("ensemble_cached", both, {"SUM": INTS}, [only], kept).write(directory)

    negative = Step("cached", {"INPUT0": "INPUT0"}, {"OUTPUT1": "OUTPUT0"})
    ensemble("ensemble_of_cached", {"INPUT0": FLOATS}, {"OUTPUT0": FLOATS}, [negative]).write(directory)

    _sum_of_two().write(directory)
    slow = [
        Step(f"slow_rows_sharing{suffix}", {"INPUT0": "INPUT0"}, {"OUTPUT0": f"row{suffix}"}) for suffix in ("", "_too")
    ]
    join = Step("sum_of_two", {"INPUT0": "row", "INPUT1": "row_too"}, {"OUTPUT0": "OUTPUT0"})
    ensemble("ensemble_diamond", {"INPUT0": FLOATS}, {"OUTPUT0": FLOATS}, [*slow, join]).write(directory)

    lookup = Step("failing", {"INPUT0": "INDEX"}, {"OUTPUT0": "VALUE"})
    copy = Step("identity_1d_int64", {"INPUT0": "INDEX"}, {"OUTPUT0": "COPY"})
    outputs = {"VALUE": "TYPE_FP32 -1", "COPY": "TYPE_INT64 -1"}
    ensemble("ensemble_failing", {"INDEX": "TYPE_INT64 -1"}, outputs, [lookup, copy]).write(directory)

    digits = Step("digits", {"image": "PICTURE"}, {"probabilities": "DIGIT"})
    picture = {"PICTURE": "TYPE_FP32 1 8 8"}
    ensemble("ensemble_digits", picture, {"DIGIT": "TYPE_FP32 10"}, [digits], "max_batch_size: 64").write(directory)


def make_handler_ensembles(directory: Path) -> None:
    """Write ensembles of the handler models `job_stream` and `job_echo`.

    - ensemble_stream: COUNT, a JSON text → NUMBER, one for each that job_stream yields, by way of job_echo
    """
    steps = [
        Step("job_stream", {"input": "COUNT"}, {"output": "number"}),
        Step("job_echo", {"input": "number"}, {"output": "NUMBER"}),
    ]
    decoupled = "model_transaction_policy { decoupled: true }"
    limit = "max_inflight_requests: 1"
    made = ensemble("ensemble_stream", {"COUNT": TEXT}, {"NUMBER": TEXT}, steps, decoupled, limit)
    made.write(directory)


def make_broken_ensembles(directory: Path) -> None:
    """Write ensembles none of which loads, beside the sample models and a model `broken` that does not load either.

    - ensemble_missing: `nowhere` and `elsewhere` are in no repository
    - ensemble_of_broken, ensemble_of_that: by `broken`; by ensemble_of_broken
    - ensemble_circle_a, ensemble_circle_b: by each other
    - ensemble_version: by version 9 of `simple`
    - ensemble_batch: a batch of 9, where `simple` takes 8
    - ensemble_input, ensemble_unmapped, ensemble_datatype: an input that `simple` lacks; one of its that is left out;
      FP32 where it takes INT32
    - ensemble_unwritten: an output that no step writes
    """
    one = {"INPUT0": INTS}
    given = {"OUTPUT0": INTS}

    def by(model: str, *inputs: str, version: int = -1) -> Step:
        return Step(model, dict.fromkeys(inputs or ("INPUT0",), "INPUT0"), {"OUTPUT0": "OUTPUT0"}, version)

    both = "INPUT0", "INPUT1"
    nowhere = Step("nowhere", {"INPUT0": "INPUT0"}, {"OUTPUT0": "middle"})
    elsewhere = Step("elsewhere", {"INPUT0": "middle"}, {"OUTPUT0": "OUTPUT0"})
    batch = "max_batch_size: 8"
    for made in (
        ensemble("ensemble_missing", one, given, [nowhere, elsewhere]),
        ensemble("ensemble_of_broken", one, given, [by("broken")]),
        ensemble("ensemble_of_that", one, given, [by("ensemble_of_broken")]),
        ensemble("ensemble_circle_a", one, given, [by("ensemble_circle_b")]),
        ensemble("ensemble_circle_b", one, given, [by("ensemble_circle_a")]),
        ensemble("ensemble_version", one, given, [by("simple", *both, version=9)], batch),
        ensemble("ensemble_batch", one, given, [by("simple", *both)], "max_batch_size: 9"),
        ensemble("ensemble_input", one, given, [by("simple", "INPUT9", *both)], batch),
        ensemble("ensemble_unmapped", one, given, [by("simple")], batch),
        ensemble("ensemble_datatype", {"INPUT0": "TYPE_FP32 16"}, given, [by("simple", *both)], batch),
        ensemble("ensemble_unwritten", one, {**given, "OUTPUT9": INTS}, [by("simple", *both)], batch),
    ):
        made.write(directory)


def _sum_of_two() -> Directory:
    rows = ("rows", "columns")
    model = graph(
        "sum_of_two",
        [node("Add", "INPUT0 INPUT1", "OUTPUT0")],
        [tensor(name, TensorProto.FLOAT, rows) for name in ("INPUT0", "INPUT1")],
        [tensor("OUTPUT0", TensorProto.FLOAT, rows)],
    )
    return Directory("sum_of_two", {"1/model.onnx": model})
