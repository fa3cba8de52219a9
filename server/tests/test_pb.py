"""The contract in proto/ is the public protocol's, and its messages live beside another client's."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from penstock import pb
from tritonclient.grpc import model_config_pb2, service_pb2

REFERENCE: dict[str, FileDescriptor] = {
    "grpc_service.proto": service_pb2.DESCRIPTOR,
    "model_config.proto": model_config_pb2.DESCRIPTOR,
}


@pytest.mark.parametrize("name", REFERENCE)
def test_every_fact_of_a_file_equals_the_reference_client(name: str) -> None:
    ours = facts(pb.POOL.FindFileByName(name))
    theirs = facts(REFERENCE[name])
    assert ours == theirs
    assert len(theirs) > 80


@pytest.mark.parametrize("name", REFERENCE)
def test_fields_are_declared_in_the_order_in_which_the_reference_prints_them(name: str) -> None:
    ours, theirs = pb.POOL.FindFileByName(name), REFERENCE[name]
    for message in messages(theirs):
        fields = pb.POOL.FindMessageTypeByName(message.full_name).fields
        assert [field.name for field in fields] == [field.name for field in message.fields], message.full_name
    assert {message.full_name for message in messages(ours)} == {message.full_name for message in messages(theirs)}


def test_our_messages_and_the_reference_client_s_share_a_process_but_no_descriptor() -> None:
    ours = pb.ModelInferRequest(model_name="m", inputs=[pb.ModelInferRequest.InferInputTensor(name="x", shape=[1, -1])])
    theirs = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert theirs.DESCRIPTOR is not ours.DESCRIPTOR
    assert theirs.SerializeToString(deterministic=True) == ours.SerializeToString(deterministic=True)
    assert list(theirs.inputs[0].shape) == [1, -1]


@pytest.mark.parametrize(
    ("first", "second"), [("penstock.pb", "tritonclient.grpc"), ("tritonclient.grpc", "penstock.pb")]
)
def test_a_fresh_process_imports_both_in_either_order(first: str, second: str) -> None:
    code = f"import {first}, {second}, penstock.pb; assert penstock.pb.ModelConfig(name='m').name == 'm'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_services_list_their_methods_with_their_streaming_sides() -> None:
    methods = {
        f"{service}/{method.name}": (method.client_streaming, method.server_streaming)
        for service in pb.SERVICES
        for method in pb.POOL.FindServiceByName(service).methods
    }
    streams = {name: sides for name, sides in methods.items() if sides != (False, False)}
    assert streams == {
        "inference.GRPCInferenceService/ModelStreamInfer": (True, True),
        "grpc.health.v1.Health/Watch": (False, True),
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo": (True, True),
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (True, True),
    }
    assert len(methods) == 20 + 2 + 1 + 1


def test_enums_have_numbers_and_names() -> None:
    assert pb.DataType.Value("TYPE_BF16") == pb.TYPE_BF16 == 14
    assert pb.DataType.Name(pb.TYPE_STRING) == "TYPE_STRING"
    assert pb.ModelInstanceGroup.Kind.Name(pb.ModelInstanceGroup.KIND_CPU) == "KIND_CPU"
    assert pb.health.HealthCheckResponse.SERVING == 1


def test_the_health_service_has_the_standard_bytes() -> None:
    assert pb.health.HealthCheckRequest(service="m").SerializeToString() == b"\x0a\x01m"
    assert (
        pb.health.HealthCheckResponse(status=pb.health.HealthCheckResponse.NOT_SERVING).SerializeToString()
        == b"\x08\x02"
    )


def test_both_reflection_packages_have_the_standard_bytes() -> None:
    for request, response in (
        (pb.reflection_v1.ServerReflectionRequest, pb.reflection_v1.ServerReflectionResponse),
        (pb.reflection_v1alpha.ServerReflectionRequest, pb.reflection_v1alpha.ServerReflectionResponse),
    ):
        asked = request(host="h", file_containing_symbol="s")
        assert asked.SerializeToString(deterministic=True) == b"\x0a\x01h\x22\x01s"
        answer = response.FromString(b"\x32\x05\x0a\x03\x0a\x01x\x12\x02\x3a\x00")
        assert answer.list_services_response.service[0].name == "x"
        assert answer.original_request.WhichOneof("message_request") == "list_services"


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("inference.GRPCInferenceService", ["model_config.proto", "grpc_service.proto"]),
        ("inference.GRPCInferenceService.ModelInfer", ["model_config.proto", "grpc_service.proto"]),
        ("inference.ModelConfig", ["model_config.proto"]),
        ("inference.ModelInstanceGroup.Kind", ["model_config.proto"]),
        ("grpc.health.v1.Health", ["health.proto"]),
        ("grpc.reflection.v1alpha.ServerReflectionRequest.host", ["reflection_v1alpha.proto"]),
    ],
)
def test_a_symbol_is_described_by_its_file_after_what_it_imports(symbol: str, expected: list[str]) -> None:
    described = [FileDescriptorProto.FromString(content).name for content in pb.describe_symbol(symbol)]
    assert described == expected
    assert pb.describe_file(expected[-1]) == pb.describe_symbol(symbol)


@pytest.mark.parametrize("symbol", ["inference.Nothing", "inference.GRPCInferenceService.Nothing", ""])
def test_an_unknown_symbol_is_a_key_error(symbol: str) -> None:
    with pytest.raises(KeyError):
        pb.describe_symbol(symbol)
    with pytest.raises(KeyError):
        pb.describe_file(f"{symbol}.proto")


def test_the_committed_descriptors_and_stubs_are_current() -> None:
    compiler = Path(__file__).parents[2] / "proto" / "compile.py"
    run = subprocess.run([sys.executable, compiler, "--check"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def facts(file: FileDescriptor) -> set[tuple[object, ...]]:
    """Every message, field, oneof, enum value and method of a file, one tuple each, options apart."""
    found: set[tuple[object, ...]] = {(file.name, file.package, *(imported.name for imported in file.dependencies))}
    for message in messages(file):
        found.add((message.full_name, message.GetOptions().map_entry))
        found.update(field_facts(field) for field in message.fields)
        found.update((oneof.full_name, *(field.name for field in oneof.fields)) for oneof in message.oneofs)
        found.update(fact for enum in message.enum_types for fact in enum_facts(enum))
    for enum in file.enum_types_by_name.values():
        found.update(enum_facts(enum))
    for service in file.services_by_name.values():
        found.update(
            (
                method.full_name,
                method.input_type.full_name,
                method.output_type.full_name,
                method.client_streaming,
                method.server_streaming,
            )
            for method in service.methods
        )
    return found


def field_facts(field: FieldDescriptor) -> tuple[object, ...]:
    return (
        field.full_name,
        field.number,
        field.type,
        field.is_repeated,
        field.is_packed,
        field.has_presence,
        field.json_name,
        field.message_type and field.message_type.full_name,
        field.enum_type and field.enum_type.full_name,
        field.containing_oneof and field.containing_oneof.name,
    )


def enum_facts(enum: EnumDescriptor) -> list[tuple[object, ...]]:
    return [(enum.full_name, value.name, value.number) for value in enum.values]


def messages(file: FileDescriptor) -> list[Descriptor]:
    """Every message of a file, map entries and all, at any depth."""
    found = list(file.message_types_by_name.values())
    for message in found:
        found.extend(message.nested_types)
    return found
