"""Inference messages become requests with the protocol's checks, and responses become the wire's bytes."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.grpc_api import tensors
from penstock.grpc_api.bodies import whole
from penstock.messages import InferRequest, InferResponse, RequestedOutput, Sequence
from penstock.model_config import Signature, TensorSpec
from penstock.tensor import BYTES, DATATYPES, Tensor, objects

RESERVED_TEXT = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)
Message = pb.ModelInferRequest
Parameter = pb.InferParameter
Input = pb.ModelInferRequest.InferInputTensor
Output = pb.ModelInferRequest.InferRequestedOutputTensor
Contents = pb.InferTensorContents


def signature(datatype: str = "INT32", inputs: tuple[str, ...] = ("A",), max_batch_size: int = 0) -> Signature:
    leading = (-1,) if max_batch_size else ()
    specs = [TensorSpec(name, DATATYPES[datatype], (-1,), (*leading, -1)) for name in (*inputs, "Y")]
    *given, output = specs
    return Signature(
        "m", {spec.name: spec for spec in given}, {"Y": output}, frozenset(inputs), max_batch_size, max_batch_size
    )


def decode(message: Message, to: Signature | None = None) -> InferRequest:
    return tensors.decode(message, to or signature(), max_tensors=4, max_rank=3)


def good() -> Message:
    """A request that is admitted: A = [1, 2]."""
    return Message(
        model_name="m",
        inputs=[Input(name="A", datatype="INT32", shape=[2])],
        raw_input_contents=[struct.pack("<2i", 1, 2)],
    )


def typed(datatype: str, contents: Contents, count: int) -> Message:
    return Message(model_name="m", inputs=[Input(name="A", datatype=datatype, shape=[count], contents=contents)])


def refusal(message: Message, to: Signature | None = None) -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        decode(message, to)
    return caught.value.kind, caught.value.message


def test_raw_contents_are_taken_in_order_and_stay_views() -> None:
    message = Message(
        model_name="m",
        model_version="3",
        id="7",
        inputs=[Input(name=name, datatype="INT32", shape=[2]) for name in ("B", "A")],
        outputs=[Output(name="Y")],
        raw_input_contents=[struct.pack("<2i", 1, 2), struct.pack("<2i", 3, 4), b"surplus"],
    )
    request = decode(message, signature(inputs=("A", "B")))
    assert (request.model, request.version, request.id, request.rows) == ("m", "3", "7", 1)
    assert {name: tensor.array.tolist() for name, tensor in request.inputs.items()} == {"B": [1, 2], "A": [3, 4]}
    assert all(not tensor.array.flags.owndata for tensor in request.inputs.values())
    assert request.outputs == {"Y": RequestedOutput("Y")}


def test_rows_are_those_of_the_batch_axis() -> None:
    message = Message(
        model_name="m", inputs=[Input(name="A", datatype="INT32", shape=[2, 1])], raw_input_contents=[bytes(8)]
    )
    assert decode(message, signature(max_batch_size=4)).rows == 2


@pytest.mark.parametrize(
    ("datatype", "contents", "values"),
    [
        ("BOOL", Contents(bool_contents=[True, False]), [True, False]),
        ("INT8", Contents(int_contents=[-1, 300]), [-1, 44]),
        ("INT16", Contents(int_contents=[-2, 65537]), [-2, 1]),
        ("INT32", Contents(int_contents=[-(2**31), 7]), [-(2**31), 7]),
        ("INT64", Contents(int64_contents=[-(2**63)]), [-(2**63)]),
        ("UINT8", Contents(uint_contents=[255, 300]), [255, 44]),
        ("UINT16", Contents(uint_contents=[65535, 65537]), [65535, 1]),
        ("UINT32", Contents(uint_contents=[2**32 - 1]), [2**32 - 1]),
        ("UINT64", Contents(uint64_contents=[2**64 - 1]), [2**64 - 1]),
        ("FP32", Contents(fp32_contents=[0.5, -1.0]), [0.5, -1.0]),
        ("FP64", Contents(fp64_contents=[0.1]), [0.1]),
        ("BYTES", Contents(bytes_contents=[b"", b"a\0b"]), [b"", b"a\0b"]),
    ],
)
def test_a_typed_list_becomes_an_array_of_its_datatype(datatype: str, contents: Contents, values: list[object]) -> None:
    request = decode(typed(datatype, contents, len(values)), signature(datatype))
    array = request.inputs["A"].array
    assert (array.dtype, array.tolist()) == (DATATYPES[datatype].dtype, values)


def test_every_datatype_names_its_typed_list_as_the_type_table_does() -> None:
    listed = {datatype: name for name, datatypes in tensors.CONTENTS.items() for datatype in datatypes}
    assert listed == {name: row.contents for name, row in DATATYPES.items() if row.contents}
    assert set(tensors.CONTENTS) == {field.name for field in Contents.DESCRIPTOR.fields}


def test_empty_contents_are_the_data_of_a_tensor_without_elements() -> None:
    assert decode(typed("INT32", Contents(), 0)).inputs["A"].array.shape == (0,)


Change = Callable[[Message], None]


def test_empty_contents_beside_raw_contents_say_nothing() -> None:
    message = good()
    message.inputs[0].contents.SetInParent()
    assert decode(message).inputs["A"].array.tolist() == decode(good()).inputs["A"].array.tolist()


def change(**parameters: Parameter) -> Change:
    def add(message: Message) -> None:
        for key, value in parameters.items():
            message.parameters[key].CopyFrom(value)

    return add


def on_input(**parameters: Parameter) -> Change:
    def add(message: Message) -> None:
        for key, value in parameters.items():
            message.inputs[0].parameters[key].CopyFrom(value)

    return add


def on_output(**parameters: Parameter) -> Change:
    def add(message: Message) -> None:
        output = message.outputs.add(name="Y")
        for key, value in parameters.items():
            output.parameters[key].CopyFrom(value)

    return add


def contents(**lists: list[object]) -> Change:
    def replace(message: Message) -> None:
        del message.raw_input_contents[:]
        message.inputs[0].contents.CopyFrom(Contents(**lists))  # type: ignore[arg-type]

    return replace


def no_data(message: Message) -> None:
    del message.raw_input_contents[:]


def both(message: Message) -> None:
    message.inputs[0].contents.int_contents.append(1)


def both_in_shared_memory(message: Message) -> None:
    both(message)
    on_input(shared_memory_region=TEXT, shared_memory_byte_size=INTEGER)(message)


def unknown_datatype(message: Message) -> None:
    contents(fp32_contents=[1.0])(message)
    message.inputs[0].datatype = "XX"


TEXT, INTEGER, FLAG = Parameter(string_param="r"), Parameter(int64_param=8), Parameter(bool_param=True)
UNSIGNED, REAL = Parameter(uint64_param=5), Parameter(double_param=0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            change(sequence_id=FLAG),
            "invalid value type for 'sequence_id' parameter, expected int64_param or string_param.",
        ),
        (change(sequence_start=INTEGER), "invalid value type for 'sequence_start' parameter, expected bool_param."),
        (change(sequence_end=TEXT), "invalid value type for 'sequence_end' parameter, expected bool_param."),
        (change(priority=Parameter(int64_param=-1)), "invalid value for 'priority', expected value >= 0."),
        (change(priority=TEXT), "invalid value type for 'priority' parameter, expected int64_param or uint64_param."),
        (change(timeout=TEXT), "invalid value type for 'timeout' parameter, expected int64_param."),
        (change(timeout=UNSIGNED), "invalid value type for 'timeout' parameter, expected int64_param."),
        (
            change(triton_enable_empty_final_response=INTEGER),
            "invalid value type for 'triton_enable_empty_final_response' parameter, expected bool_param.",
        ),
        (change(triton_x=TEXT), RESERVED_TEXT),
        (
            change(foo=UNSIGNED),
            "invalid value type for 'foo' parameter, expected int64_param, bool_param, or string_param.",
        ),
        (
            change(foo=Parameter()),
            "invalid value type for 'foo' parameter, expected int64_param, bool_param, or string_param.",
        ),
        (
            both_in_shared_memory,
            "unexpected 'content' provided when using shared memory for input tensor 'A' for model 'm'",
        ),
        (both, "contents field must not be specified when using raw_input_contents for 'A' for model 'm'"),
        (no_data, "unable to find data for input tensor 'A' for model 'm' in request."),
        (
            contents(int_contents=[1, 2], fp32_contents=[1.0]),
            "unexpected explicit tensor data for input tensor 'A' for model 'm', binary data was already supplied.",
        ),
        (
            contents(bool_contents=[True], int_contents=[1, 2]),
            "unexpected explicit tensor data for input tensor 'A' for model 'm' of type 'BOOL', "
            "expected datatype 'INT32'",
        ),
        (
            contents(uint_contents=[1, 2]),
            "unexpected explicit tensor data for input tensor 'A' for model 'm' of type 'UINT32', "
            "expected datatype 'INT32'",
        ),
        (
            unknown_datatype,
            "unexpected explicit tensor data for input tensor 'A' for model 'm' of type 'FP32', "
            "expected datatype '<invalid>'",
        ),
        (
            contents(int_contents=[1]),
            "[request id: <id_unknown>] input byte size mismatch for input 'A' for model 'm'. Expected 8, got 4",
        ),
        (
            on_input(shared_memory_region=INTEGER),
            "invalid value type for 'shared_memory_region' parameter for tensor 'A', expected string_param.",
        ),
        (
            on_input(shared_memory_region=TEXT, shared_memory_offset=TEXT),
            "invalid value type for 'shared_memory_offset' parameter for tensor 'A', expected int64_param.",
        ),
        (
            on_input(shared_memory_region=TEXT, shared_memory_byte_size=TEXT),
            "invalid value type for 'shared_memory_byte_size' parameter for tensor 'A', expected int64_param.",
        ),
        (
            on_input(shared_memory_offset=INTEGER),
            "'shared_memory_offset' can not be specified without 'shared_memory_region' parameter for tensor 'A'",
        ),
        (
            on_input(shared_memory_byte_size=INTEGER),
            "'shared_memory_byte_size' can not be specified without 'shared_memory_region' parameter for tensor 'A'",
        ),
        (
            on_input(shared_memory_region=TEXT),
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor 'A'",
        ),
        (
            on_output(classification=TEXT),
            "invalid value type for 'classification' parameter, expected int64_param",
        ),
        (
            on_output(classification=Parameter(int64_param=0)),
            "invalid value for 'classification' parameter, expected >= 0",
        ),
        (
            on_output(classification=INTEGER, shared_memory_region=TEXT, shared_memory_byte_size=INTEGER),
            "output can't set both 'shared_memory_region' and 'classification'",
        ),
        (
            lambda message: message.inputs.extend([Input()] * 4),
            "request has 5 inputs, the limit is 4. Use --max-tensors to increase it.",
        ),
        (
            lambda message: message.inputs[0].shape.extend([1] * 3),
            "invalid shape for input 'A': it has 4 dimensions, the limit is 3. Use --max-rank to increase it.",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_the_protocol_s_words(wrong: Change, message: str) -> None:
    request = good()
    wrong(request)
    assert refusal(request) == (Kind.INVALID, message)


def test_half_precision_has_no_typed_list() -> None:
    assert refusal(typed("FP16", Contents(fp32_contents=[1.0]), 1), signature("FP16"))[1] == (
        "unexpected explicit tensor data for input tensor 'A' for model 'm' of type 'FP32', expected datatype 'FP16'"
    )


def test_a_narrow_integer_is_named_where_another_integer_was_expected() -> None:
    assert refusal(typed("INT8", Contents(int64_contents=[1]), 1), signature("INT8"))[1] == (
        "unexpected explicit tensor data for input tensor 'A' for model 'm' of type 'INT64', expected datatype 'INT8'"
    )


@pytest.mark.parametrize("place", [on_input, on_output])
def test_a_tensor_in_shared_memory_is_refused_by_the_region_s_name(place: Callable[..., Change]) -> None:
    request = good()
    place(shared_memory_region=TEXT, shared_memory_byte_size=INTEGER, shared_memory_offset=INTEGER)(request)
    kind, message = refusal(request)
    assert kind is Kind.UNSUPPORTED
    assert "shared memory region 'r'" in message


def test_parameters_without_a_meaning_go_to_the_model() -> None:
    request = good()
    change(i=INTEGER, b=FLAG, s=TEXT, d=REAL, timeout=INTEGER, triton_enable_empty_final_response=FLAG)(request)
    assert decode(request).parameters == {"i": 8, "b": True, "s": "r", "d": 0.5}


@pytest.mark.parametrize(("value", "priority"), [(INTEGER, 8), (UNSIGNED, 5)])
def test_a_priority_comes_signed_or_unsigned(value: Parameter, priority: int) -> None:
    request = good()
    change(priority=value)(request)
    assert decode(request).priority == priority


@pytest.mark.parametrize(
    ("parameters", "sequence"),
    [
        ({"sequence_id": INTEGER, "sequence_start": FLAG}, Sequence(8, start=True)),
        ({"sequence_id": TEXT, "sequence_end": FLAG}, Sequence("r", end=True)),
        ({"sequence_id": Parameter(int64_param=-1)}, Sequence(2**64 - 1)),
        ({"sequence_id": Parameter(int64_param=0), "sequence_start": FLAG}, None),
        ({"sequence_id": Parameter(string_param="")}, None),
        ({"sequence_start": FLAG}, None),
    ],
)
def test_a_sequence_has_an_id_other_than_zero_and_empty(
    parameters: dict[str, Parameter], sequence: Sequence | None
) -> None:
    request = good()
    change(**parameters)(request)
    assert decode(request).sequence == sequence


def test_a_sequence_id_has_at_most_128_characters() -> None:
    request = good()
    change(sequence_id=Parameter(string_param="i" * 129))(request)
    assert refusal(request) == (Kind.UNSUPPORTED, "string correlation ID cannot be longer than 128 characters")


def test_a_classification_is_asked_of_an_output() -> None:
    request = good()
    on_output(classification=INTEGER)(request)
    assert decode(request).outputs == {"Y": RequestedOutput("Y", classification=8)}


def test_an_output_asked_for_twice_is_refused() -> None:
    request = good()
    on_output()(request)
    on_output()(request)
    assert refusal(request) == (Kind.INVALID, "[request id: <id_unknown>] output 'Y' already exists in request")


def test_a_response_is_the_bytes_that_protobuf_would_write() -> None:
    large = np.arange(200, dtype=np.int32)
    response = InferResponse(
        "m",
        "2",
        "7",
        [
            Tensor("empty", DATATYPES["FP32"], np.zeros((0, 3), np.float32)),
            Tensor("large", DATATYPES["INT32"], large),
            Tensor("text", BYTES, objects([b"a", b""], (2, 1))),
            Tensor("half", DATATYPES["BF16"], np.ones((1,), DATATYPES["BF16"].dtype)),
            Tensor("turned", DATATYPES["UINT8"], np.arange(4, dtype=np.uint8).reshape(2, 2).T),
        ],
        {"b": True, "i": -1, "d": 0.5, "s": "x"},
    )
    expected = pb.ModelInferResponse(model_name="m", model_version="2", id="7")
    for key, parameter in (
        ("b", Parameter(bool_param=True)),
        ("i", Parameter(int64_param=-1)),
        ("d", REAL),
        ("s", Parameter(string_param="x")),
    ):
        expected.parameters[key].CopyFrom(parameter)
    for name, datatype, shape, raw in (
        ("empty", "FP32", [0, 3], b""),
        ("large", "INT32", [200], large.tobytes()),
        ("text", "BYTES", [2, 1], b"\1\0\0\0a\0\0\0\0"),
        ("half", "BF16", [1], b"\x80\x3f"),
        ("turned", "UINT8", [2, 2], b"\0\2\1\3"),
    ):
        expected.outputs.add(name=name, datatype=datatype, shape=shape)
        expected.raw_output_contents.append(raw)
    body = whole(tensors.encode(response))
    decoded = pb.ModelInferResponse.FromString(body)
    assert decoded == expected
    assert len(body) == expected.ByteSize()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 2**21])
def test_a_raw_entry_of_any_size_reads_back(size: int) -> None:
    response = InferResponse("m", "1", "", [Tensor("y", DATATYPES["UINT8"], np.zeros(size, np.uint8))])
    assert list(map(len, pb.ModelInferResponse.FromString(whole(tensors.encode(response))).raw_output_contents)) == [
        size
    ]
