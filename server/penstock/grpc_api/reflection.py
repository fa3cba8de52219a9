"""Server reflection, v1 and v1alpha: the same messages under two package names.

It tells what can be asked, as metadata does, and is guarded like it.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from penstock import pb
from penstock.auth import Category
from penstock.grpc_api.calls import Call, Door, Status, Stream


def row(package: str, wire: Any) -> Stream[Any, Any]:
    """The row of one version, whose messages are names in `wire`."""

    async def serve(_door: Door, messages: AsyncIterator[Any], _call: Call) -> AsyncGenerator[Any, None]:
        async for message in messages:
            yield answer(wire, message)

    return Stream(
        f"/{package}.ServerReflection/ServerReflectionInfo",
        wire.ServerReflectionRequest.FromString,
        wire.ServerReflectionResponse.SerializeToString,
        serve,
        Category.METADATA,
        drains=False,
    )


def answer(wire: Any, message: Any) -> Any:
    """The ServerReflectionResponse to a ServerReflectionRequest. What is not found is an answer too, not a status."""
    response = wire.ServerReflectionResponse(valid_host=message.host, original_request=message)
    question = message.WhichOneof("message_request")
    try:
        match question:
            case "list_services":
                response.list_services_response.service.extend(
                    wire.ServiceResponse(name=name) for name in sorted(pb.SERVICES)
                )
            case "file_by_filename":
                response.file_descriptor_response.file_descriptor_proto.extend(
                    pb.describe_file(message.file_by_filename)
                )
            case "file_containing_symbol":
                response.file_descriptor_response.file_descriptor_proto.extend(
                    pb.describe_symbol(message.file_containing_symbol)
                )
            case "file_containing_extension" | "all_extension_numbers_of_type":
                raise KeyError("the protocol is proto3 and has no extensions")
            case _:
                response.error_response.error_code = Status.INVALID_ARGUMENT
                response.error_response.error_message = "the request asks nothing"
    except KeyError as error:
        response.error_response.error_code = Status.NOT_FOUND
        response.error_response.error_message = str(error.args[0])
    return response


ROWS = (
    row("grpc.reflection.v1", pb.reflection_v1),
    row("grpc.reflection.v1alpha", pb.reflection_v1alpha),
)
