"""Commands that can be copied: a request made from a model's own inputs, ones for every open dimension.

To a model that has sequences it is a whole one: its first request and its last.
"""

import json
import shlex
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from penstock.model_config import Signature, TensorSpec
from penstock.tensor import BF16, BOOL, BYTES, count

MOST_WRITTEN_OUT = 1000  # elements of all inputs; above that, a line of Python makes them
SEQUENCE = {"sequence_id": 1, "sequence_start": True, "sequence_end": True}


def elements(signature: Signature) -> int:
    """How many elements the sample request has."""
    return sum(count(_shape(spec)) for spec in _inputs(signature))


def difficulty(signature: Signature) -> tuple[bool, int]:
    """Orders models by how easily the sample request reads: numbers before text or sequences, few elements first."""
    return signature.sequences or any(spec.datatype is BYTES for spec in _inputs(signature)), elements(signature)


def curl(signature: Signature, url: str, keyed: bool = False, text: str = "1") -> str:
    """A request in JSON to the server at `url`, with an API key from the shell's variable KEY where it is `keyed`.

    `text` is what inputs of text have.
    """
    silent = _silent(keyed)
    target = f"{url}/v2/models/{quote(signature.model, safe='')}/infer"
    if elements(signature) <= MOST_WRITTEN_OUT:
        head = {"parameters": SEQUENCE} if signature.sequences else {}
        entries = [_entry(spec, text) for spec in _inputs(signature)]
        body = json.dumps({**head, "inputs": entries}, separators=(",", ":"))
        return f"{silent} {target} -d {shlex.quote(body)}"
    written = ", ".join(
        f"dict(name={spec.name!r}, shape={_shape(spec)}, datatype={spec.datatype.name!r}, "
        f"data=[{_value(spec, text)!r}] * {count(_shape(spec))})"
        for spec in _inputs(signature)
    )
    parameters = f"parameters={SEQUENCE}, " if signature.sequences else ""
    script = f"import json; print(json.dumps(dict({parameters}inputs=[{written}])))"
    return f"python3 -c {shlex.quote(script)} | {silent} {target} -d @-"


def job(model: str, url: str, keyed: bool = False) -> str:
    """A job for a handler, with an input that is still to be filled in: nobody but the handler knows its form."""
    return f"{_silent(keyed)} {url}/v2/{model}/runsync -d '{json.dumps({'input': {}})}'"


def infer(signature: Signature, options: Sequence[str] = (), text: str = "1") -> str:
    """The request of `curl` as a `penstock infer` line, with `options` after the model's name."""
    whole = ["--sequence", "1", "--start", "--end"] if signature.sequences else []
    head = shlex.join(["penstock", "infer", signature.model, *options, *whole])
    if elements(signature) <= MOST_WRITTEN_OUT:
        values = [f"{spec.name}={json.dumps(_nested(spec, _shape(spec), text))}" for spec in _inputs(signature)]
        return f"{head} {shlex.join(values)}"
    saves = "; ".join(
        f"numpy.save({f'{position}.npy'!r}, numpy.full({_shape(spec)}, {_value(spec)!r}, {_saved_as(spec)!r}))"
        for position, spec in enumerate(_inputs(signature))
    )
    files = [f"{spec.name}=@{position}.npy" for position, spec in enumerate(_inputs(signature))]
    return f"python3 -c {shlex.quote(f'import numpy; {saves}')} && {head} {shlex.join(files)}"


def _silent(keyed: bool) -> str:
    return 'curl -s -H "Authorization: Bearer $KEY"' if keyed else "curl -s"


def _inputs(signature: Signature) -> list[TensorSpec]:
    return [spec for spec in signature.inputs.values() if not spec.optional]


def _shape(spec: TensorSpec) -> list[int]:
    return [1 if dim < 0 else dim for dim in spec.shape]


def _value(spec: TensorSpec, text: str = "1") -> bool | int | str:
    return text if spec.datatype is BYTES else True if spec.datatype is BOOL else 1


def _saved_as(spec: TensorSpec) -> str:
    """The NumPy type for a file: files hold neither objects nor bfloat16."""
    return {BYTES: "S1", BF16: "<f4"}.get(spec.datatype, spec.datatype.dtype.str)


def _entry(spec: TensorSpec, text: str) -> dict[str, Any]:
    shape = _shape(spec)
    data = [_value(spec, text)] * count(shape)
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype.name, "data": data}


def _nested(spec: TensorSpec, shape: Sequence[int], text: str) -> Any:
    return [_nested(spec, shape[1:], text) for _ in range(shape[0])] if shape else _value(spec, text)
