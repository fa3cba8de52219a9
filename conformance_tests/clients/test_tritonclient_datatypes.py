"""Every datatype through each of tritonclient's four clients, in every way that the client can carry it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from conformance_tests.clause_table import clause
from conformance_tests.clients.test_tritonclient import (
    grpc_address,
    grpc_api,
    http_address,
    http_api,
    run_grpc,
    run_http,
    tensor,
)
from conformance_tests.server import Target
from conformance_tests.tensors import DATATYPES, Array, same

__all__ = ["grpc_address", "http_address"]  # fixtures

SHAPES = [(2, 3), (1, 1), (0, 3), (2, 0)]
BINARY_ONLY = ("BF16",)  # tritonclient refuses to write it as JSON
WAYS = [(binary_in, binary_out) for binary_in in (True, False) for binary_out in (True, False)]
every_datatype = pytest.mark.parametrize("datatype", sorted(DATATYPES))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def sample(datatype: str, shape: Sequence[int]) -> Array:
    """Numbers with both signs where there are two, text beyond ASCII."""
    size = int(np.prod(shape))
    if datatype == "BYTES":
        made = np.empty(size, np.object_)
        made[:] = ["", "ä€語", "two words", "\x00\x01", "1", "x" * 300][:size]
        return np.array([text.encode() for text in made], np.object_).reshape(shape)
    counted = np.arange(size)
    if datatype == "BOOL":
        truths: Array = (counted % 2 == 0).reshape(shape)
        return truths
    dtype = DATATYPES[datatype].dtype
    signed = counted - 2 if datatype.startswith(("INT", "FP", "BF")) else counted + 1
    fraction = 4 if datatype.startswith(("FP", "BF")) else 1
    numbers: Array = (signed / fraction).astype(dtype).reshape(shape)
    return numbers


def check(datatype: str, result: Any, sent: Array) -> None:
    got = result.as_numpy("OUTPUT0")
    if datatype == "BYTES":  # of JSON the client makes text, of binary data bytes
        got = np.array([x.encode() if isinstance(x, str) else x for x in got.reshape(-1)], np.object_).reshape(
            got.shape
        )
    assert got.shape == sent.shape
    assert same(datatype, got.astype(sent.dtype), sent)


@clause("clients.tritonclient_http")
@every_shape
@every_datatype
def test_http(http_address: str, target: Target, datatype: str, shape: tuple[int, ...]) -> None:
    model, sent = f"identity_{datatype.lower()}", sample(datatype, shape)
    target.require(model)
    with http_api.InferenceServerClient(http_address) as client:
        for binary_in, binary_out in WAYS:
            if datatype in BINARY_ONLY and not binary_in:
                with pytest.raises(InferenceServerException, match="binary_data"):
                    tensor(http_api, "INPUT0", sent, datatype, binary_data=False)
                continue
            inputs = [tensor(http_api, "INPUT0", sent, datatype, binary_data=binary_in)]
            outputs = [http_api.InferRequestedOutput("OUTPUT0", binary_data=binary_out)]
            check(datatype, client.infer(model, inputs, outputs=outputs), sent)


@clause("clients.tritonclient_http_aio")
@every_datatype
def test_http_aio(http_address: str, target: Target, datatype: str) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)

    async def steps(client: Any) -> None:
        for shape in SHAPES:
            sent = sample(datatype, shape)
            for binary_in, binary_out in WAYS:
                if datatype in BINARY_ONLY and not binary_in:
                    continue
                inputs = [tensor(http_api, "INPUT0", sent, datatype, binary_data=binary_in)]
                outputs = [http_api.InferRequestedOutput("OUTPUT0", binary_data=binary_out)]
                check(datatype, await client.infer(model, inputs, outputs=outputs), sent)

    run_http(http_address, steps)


@clause("clients.tritonclient_grpc")
@every_shape
@every_datatype
def test_grpc(grpc_address: str, target: Target, datatype: str, shape: tuple[int, ...]) -> None:
    model, sent = f"identity_{datatype.lower()}", sample(datatype, shape)
    target.require(model)
    with grpc_api.InferenceServerClient(grpc_address) as client:
        check(datatype, client.infer(model, [tensor(grpc_api, "INPUT0", sent, datatype)]), sent)


@clause("clients.tritonclient_grpc_aio")
@every_datatype
def test_grpc_aio(grpc_address: str, target: Target, datatype: str) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)

    async def steps(client: Any) -> None:
        for shape in SHAPES:
            sent = sample(datatype, shape)
            check(datatype, await client.infer(model, [tensor(grpc_api, "INPUT0", sent, datatype)]), sent)

    run_grpc(grpc_address, steps)


@clause("clients.tritonclient_http")
def test_http_scalar(http_address: str, target: Target) -> None:
    target.require("identity_scalar_fp32")
    with http_api.InferenceServerClient(http_address) as client:
        check_scalar(client, http_api)


@clause("clients.tritonclient_grpc")
def test_grpc_scalar(grpc_address: str, target: Target) -> None:
    target.require("identity_scalar_fp32")
    with grpc_api.InferenceServerClient(grpc_address) as client:
        check_scalar(client, grpc_api)


def check_scalar(client: Any, api: Any) -> None:
    sent = tensor(api, "INPUT0", np.array(2.5, np.float32), "FP32")
    assert client.infer("identity_scalar_fp32", [sent]).as_numpy("OUTPUT0").tolist() == 2.5
