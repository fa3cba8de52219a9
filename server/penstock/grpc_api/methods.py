"""The table of gRPC methods. A transport needs no more than its rows."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from penstock import control, pb
from penstock.auth import Category
from penstock.errors import ServingError
from penstock.grpc_api import health, reflection, tensors
from penstock.grpc_api.calls import Call, Door, Stream, Unary, as_it_is, failure
from penstock.grpc_api.infer import infer
from penstock.grpc_api.streaming import stream_infer

SERVICE = "inference.GRPCInferenceService"

Row: TypeAlias = Unary[Any, Any] | Stream[Any, Any]


def control_row(method: control.Method) -> Unary[Message, Message]:
    """A control method over gRPC: its fields from the request message, its answer into the response message."""
    rpc = pb.POOL.FindServiceByName(SERVICE).methods_by_name[method.rpc]
    response_class = GetMessageClass(rpc.output_type)
    path = f"/{SERVICE}/{method.rpc}"

    def run(door: Door, message: Message) -> Message:
        answer = method.call(door.engine, fields(message))
        if method.grpc_shape is not None:
            answer = method.grpc_shape(answer)
        if isinstance(answer, Message):
            return answer
        return ParseDict(answer, response_class(), ignore_unknown_fields=True, descriptor_pool=pb.POOL)

    def serve(door: Door, message: Message, call: Call, reply: Callable[[Message | ServingError], None]) -> None:
        if not method.blocking:
            return reply(run(door, message))
        # What a client has asked for is done even if it goes away meanwhile, so there is nothing to cancel.
        future = asyncio.get_running_loop().run_in_executor(None, functools.partial(run, door, message))
        return future.add_done_callback(lambda done: reply(_result(path, done, call)))

    return Unary(
        path,
        GetMessageClass(rpc.input_type).FromString,
        response_class.SerializeToString,
        serve,
        method.category,
        method.keyless,
    )


def _result(path: str, done: "asyncio.Future[Message]", call: Call) -> Message | ServingError:
    error = done.exception()
    return done.result() if error is None else failure(path, error, call.name)


def fields(message: Message) -> dict[str, Any]:
    """A message as plain data: every field by its name in the contract, at its default where it is not set.

    A message that holds one value of several types (InferParameter and its like) is that value, None if it has none.
    Messages that are not set are left out.
    """
    return {
        field.name: _plain(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _plain(field: Any, value: Any) -> Any:
    kind = field.message_type
    if field.is_repeated and kind is not None and kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"]
        return {key: _plain(inner, value[key]) for key in value}
    if field.is_repeated:
        return [_single(item) for item in value]
    return _single(value)


def _single(value: Any) -> Any:
    if not isinstance(value, Message):
        return value
    if "parameter_choice" in value.DESCRIPTOR.oneofs_by_name:
        choice = value.WhichOneof("parameter_choice")
        return None if choice is None else getattr(value, choice)
    return fields(value)


ROWS: tuple[Row, ...] = (
    Unary(f"/{SERVICE}/ModelInfer", as_it_is, tensors.encode, infer, Category.INFERENCE),
    Stream(
        f"/{SERVICE}/ModelStreamInfer",
        as_it_is,
        as_it_is,
        stream_infer,
        Category.INFERENCE,
        drains=True,
    ),
    *map(control_row, control.METHODS),
    *health.ROWS,
    *reflection.ROWS,
)
METHODS: dict[str, Row] = {row.path: row for row in ROWS}
