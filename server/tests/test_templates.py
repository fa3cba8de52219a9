"""Requests that are known by their bytes."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock import pb
from penstock.grpc_api import templates, tensors
from penstock.grpc_api.templates import VIEW_BYTES, Templates, cut
from penstock.messages import InferRequest
from penstock.model_config import Signature, signature

CONFIG = pb.ModelConfig(
    name="m",
    input=[
        pb.ModelInput(name="A", data_type=pb.TYPE_INT32, dims=[-1]),
        pb.ModelInput(name="B", data_type=pb.TYPE_FP32, dims=[2], optional=True),
        pb.ModelInput(name="S", data_type=pb.TYPE_STRING, dims=[-1], optional=True),
    ],
    output=[pb.ModelOutput(name="Y", data_type=pb.TYPE_INT32, dims=[-1])],
)


def message(*values: int, id: str = "", name: str = "A", datatype: str = "INT32") -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="m",
        id=id,
        inputs=[pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=[len(values)])],
        raw_input_contents=[np.array(values, np.int32).tobytes()],
    )


def read(known: Templates, to: Signature, body: bytes) -> tuple[InferRequest, bool]:
    """As ModelInfer reads a message; and whether it was known."""
    parts = cut(body)
    template = known.find(parts) if parts else None
    if parts and template and template.signature is to and (filled := template.fill(parts)):
        return filled, True
    request = tensors.decode(pb.ModelInferRequest.FromString(body), to, 10, 10)
    if parts:
        known.learn(parts, request, to)
    return request, False


def plain(request: InferRequest) -> tuple[object, ...]:
    arrays = {name: (one.datatype.name, one.array.dtype.str, one.array.tolist(), one.array.shape)
              for name, one in request.inputs.items()}  # fmt: skip
    return (request.model, request.version, request.id, arrays, request.outputs, request.parameters, request.priority,
            request.timeout_us, request.rows, request.sequence, request.empty_final)  # fmt: skip


def test_a_second_request_is_read_by_its_bytes_whatever_its_id_and_data() -> None:
    known, to = Templates(), signature(CONFIG)
    assert not read(known, to, message(1, 2, id="1").SerializeToString())[1]
    for one in (message(3, 4), message(5, 6, id="another"), message(7, 8, id="é" * 100)):
        body = one.SerializeToString()
        request, was_known = read(known, to, body)
        assert was_known
        assert plain(request) == plain(tensors.decode(one, to, 10, 10))
        assert (request.size, request.may_classify) == (8, False)


def test_outputs_as_classes_stay_so_for_those_like_it() -> None:
    known, to = Templates(), signature(CONFIG)
    wanting = message(1, 2)
    wanting.outputs.add(name="Y").parameters["classification"].int64_param = 1
    for was_known in (False, True):
        request, known_now = read(known, to, wanting.SerializeToString())
        assert known_now is was_known
        assert request.may_classify
        assert request.outputs["Y"].classification == 1


def test_what_a_request_says_of_its_place_in_the_queue_holds_for_those_like_it() -> None:
    known, to = Templates(), signature(CONFIG)
    urgent = message(1, 2, id="1")
    urgent.parameters["priority"].uint64_param = 1
    urgent.parameters["timeout"].int64_param = 2500
    urgent.parameters["triton_enable_empty_final_response"].bool_param = True
    assert not read(known, to, urgent.SerializeToString())[1]
    urgent.id = "2"
    request, was_known = read(known, to, urgent.SerializeToString())
    assert was_known
    assert (request.priority, request.timeout_us, request.empty_final) == (1, 2500, True)


@pytest.mark.parametrize(
    "other",
    [
        message(1, 2, 3),  # another shape
        pb.ModelInferRequest(model_name="m", model_version="1"),  # no contents at all
        message(1, 2, name="B"),
    ],
)
def test_another_beginning_is_another_request(other: pb.ModelInferRequest) -> None:
    known, to = Templates(), signature(CONFIG)
    read(known, to, message(1, 2).SerializeToString())
    parts = cut(other.SerializeToString())
    assert parts is None or known.find(parts) is None


def test_data_that_is_not_what_was_promised_is_left_to_the_checks() -> None:
    known, to = Templates(), signature(CONFIG)
    read(known, to, message(1, 2).SerializeToString())
    short, surplus, bad_id = message(1, 2), message(1, 2), message(1, 2, id="xx").SerializeToString()
    short.raw_input_contents[0] = bytes(7)
    surplus.raw_input_contents.append(b"")
    for body in (short.SerializeToString(), surplus.SerializeToString(), bad_id.replace(b"xx", b"\xff\xff")):
        parts = cut(body)
        assert parts is not None
        template = known.find(parts)
        assert template is not None
        assert template.fill(parts) is None


def test_requests_that_depend_on_more_than_their_beginning_are_not_learnt() -> None:
    known, to = Templates(), signature(CONFIG)
    with_parameter = message(1, 2)
    with_parameter.parameters["p"].int64_param = 1
    strings = message(datatype="BYTES")
    strings.inputs.add(name="S", datatype="BYTES", shape=[1])
    strings.inputs[0].datatype = "INT32"
    strings.raw_input_contents.append(b"\1\0\0\0a")
    for one in (with_parameter, strings):
        body = one.SerializeToString()
        assert [read(known, to, body)[1] for _ in range(2)] == [False, False]


def test_long_contents_stay_where_they_are() -> None:
    one = message(*range(VIEW_BYTES))
    body = one.SerializeToString()
    parts = cut(body)
    assert parts is not None
    [raw] = parts.raw
    assert isinstance(raw, memoryview)
    assert raw.obj is body
    assert bytes(raw) == one.raw_input_contents[0]


def test_what_is_known_stays_bounded() -> None:
    known, to = Templates(), signature(CONFIG)
    for size in range(templates.KEPT + 10):
        read(known, to, message(*range(size)).SerializeToString())
    assert len(known._known) <= templates.KEPT


PIECES = [b"\x0a\x01m", b"\x1a\x02id", b"\x3a\x01x", b"\x2a\0", b"\x80", b"\x3a\x80\x01" + bytes(128), b"\x08\1"]


@settings(deadline=None)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES)).map(b"".join))
def test_whatever_is_cut_up_means_what_protobuf_reads(body: bytes) -> None:
    parts = cut(body)
    if parts is None:
        return
    try:
        whole = pb.ModelInferRequest.FromString(body)
        rest = pb.ModelInferRequest.FromString(parts.key)
    except DecodeError:
        return
    assert [*whole.raw_input_contents] == [bytes(raw) for raw in parts.raw]
    assert whole.id.encode() == parts.id
    whole.id = ""
    del whole.raw_input_contents[:]
    assert whole == rest
