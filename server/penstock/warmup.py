"""Requests that a version answers before it serves: `model_warmup` of its configuration."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from penstock import pb
from penstock.admission import Given, admit
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.model_config import Signature
from penstock.runtime import Instance
from penstock.tensor import BOOL, BY_CONFIG_NAME, BYTES, Datatype, count, pack

FILES = "warmup"  # the directory of data files, in the model's
NAMELESS = "[request id: <id_unknown>] "


def run(config: pb.ModelConfig, signature: Signature, directory: Path, instances: Sequence[Instance]) -> None:
    """Let each instance answer each sample as often as that says. `directory` is the model's.

    Raises ServingError(INVALID) for a sample that is no request to this model, and the model's own kind where it fails.
    """
    for name, times, request in samples(config, signature, directory):
        for instance in instances:
            for _ in range(times):
                try:
                    [result] = instance.execute([request])
                except Exception as error:
                    raise _failed(name, error) from error
                if isinstance(result, ServingError):
                    raise _failed(name, result)


def samples(config: pb.ModelConfig, signature: Signature, directory: Path) -> Iterator[tuple[str, int, InferRequest]]:
    """Name, count and request of every sample that is not skipped."""
    for sample in config.model_warmup:
        if not sample.batch_size:
            continue
        try:
            rows = sample.batch_size if signature.max_batch_size else 1
            given = [
                _given(name, setting, [rows] if signature.max_batch_size else [], directory)
                for name, setting in sample.inputs.items()
            ]
            admitted = admit(signature, "", given, [])
        except ServingError as error:
            raise _failed(sample.name, error) from error
        request = InferRequest(config.name, "", "", admitted.inputs, {}, rows=admitted.rows)
        yield sample.name, sample.count or 1, request


def _failed(name: str, error: Exception) -> ServingError:
    kind = error.kind if isinstance(error, ServingError) else Kind.INTERNAL
    return ServingError(kind, f"failed to run warmup sample '{name}': {error}; ")


def _given(name: str, setting: pb.ModelWarmup.Input, batch: list[int], directory: Path) -> Given:
    """One input of a sample: a row of data, once for every row of the batch."""
    datatype = BY_CONFIG_NAME.get(pb.DataType.Name(setting.data_type))
    if datatype is None:
        raise ServingError(Kind.INVALID, f"warmup setting expects input '{name}' to have a data_type")
    dims = list(setting.dims)
    if any(dim < 0 for dim in dims):
        raise ServingError(
            Kind.INVALID, f"warmup setting expects all variable-size dimensions are specified for input '{name}'"
        )
    elements = count(dims)
    match setting.WhichOneof("input_data_type"):
        case "zero_data":
            row = _zeros(datatype, elements)
        case "random_data":
            row = _zeros(datatype, elements) if datatype is BYTES else _random(datatype, elements)
        case "input_data_file":
            row = _read(setting.input_data_file, datatype, elements, directory / FILES)
        case _:
            raise ServingError(
                Kind.INVALID, f"{NAMELESS}warmup setting expects input '{name}' to have input_data_type set"
            )
    return Given(name, datatype.name, batch + dims, row * count(batch))


def _zeros(datatype: Datatype, elements: int) -> bytes:
    return bytes(elements * (datatype.itemsize or 4))  # BYTES: as many empty elements, each a length of four bytes


def _random(datatype: Datatype, elements: int) -> bytes:
    """Numbers from 0 to 1, or any integers; the same ones with every load."""
    random = np.random.default_rng(0)
    if datatype.is_integer:
        array = np.frombuffer(random.bytes(elements * datatype.itemsize), datatype.dtype)
    elif datatype is BOOL:
        array = random.integers(0, 2, elements).astype(bool)
    else:
        array = random.random(elements).astype(datatype.dtype)
    return bytes(pack(array, datatype))


def _read(file: str, datatype: Datatype, elements: int, directory: Path) -> bytes:
    path = directory / file
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ServingError(Kind.INVALID, f"warmup data file path '{file}' is outside {directory}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ServingError(Kind.INVALID, f"failed to read warmup data: {error}") from error
    if datatype is BYTES:
        return data
    expected = elements * datatype.itemsize
    if len(data) < expected:
        raise ServingError(
            Kind.INVALID,
            # The missing blank is Triton's.
            f"{NAMELESS}warmup setting expects {expected} bytes, but the data provided from {file}only has "
            f"{len(data)} bytes",
        )
    return data[:expected]
