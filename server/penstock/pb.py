"""Protobuf messages of `proto/`, built in a private descriptor pool.

Two files that define `inference.*` cannot coexist in protobuf's default pool, and user code may import another client
of the protocol into this process. So no Python is generated: the classes are built here from `wire.binpb`, which
`make proto` compiles, and the stubs beside it give them their static types.

Messages and enums of the package `inference` are names of this module; those of the packages `grpc.health.v1`,
`grpc.reflection.v1` and `grpc.reflection.v1alpha` are names in `health`, `reflection_v1` and `reflection_v1alpha`.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

POOL = DescriptorPool()

# Each file as a serialised FileDescriptorProto, by name. An import stands before the file that imports it.
FILES: dict[str, bytes] = {
    file.name: file.SerializeToString(deterministic=True)
    for file in FileDescriptorSet.FromString(Path(__file__).with_name("wire.binpb").read_bytes()).file
}
for _content in FILES.values():
    POOL.AddSerializedFile(_content)

# The full name of every service.
SERVICES: tuple[str, ...] = tuple(
    service.full_name for name in FILES for service in POOL.FindFileByName(name).services_by_name.values()
)


def describe_file(name: str) -> list[bytes]:
    """Serialised FileDescriptorProto of a file and of all that it imports, imports first. Raises KeyError."""
    return _with_imports(POOL.FindFileByName(name))


def describe_symbol(name: str) -> list[bytes]:
    """As `describe_file`, for the file that declares a message, field, enum, service or method by its full name."""
    owner, _, member = name.rpartition(".")
    if owner in SERVICES and member in POOL.FindServiceByName(owner).methods_by_name:
        name = owner  # The pool finds every kind of symbol but a method.
    return _with_imports(POOL.FindFileContainingSymbol(name))


def _with_imports(file: FileDescriptor) -> list[bytes]:
    wanted = {file.name}
    for name in reversed(FILES):
        if name in wanted:
            wanted.update(imported.name for imported in POOL.FindFileByName(name).dependencies)
    return [content for name, content in FILES.items() if name in wanted]


def _names(file: FileDescriptor) -> Iterator[tuple[str, object]]:
    for name, message in file.message_types_by_name.items():
        yield name, GetMessageClass(message)
    for name, enum in file.enum_types_by_name.items():
        yield name, EnumTypeWrapper(enum)
        yield from ((value.name, value.number) for value in enum.values)


if TYPE_CHECKING:
    from penstock.wire_stubs import health_pb2, reflection_pb2, reflection_v1alpha_pb2
    from penstock.wire_stubs.grpc_service_pb2 import *  # noqa: F403
    from penstock.wire_stubs.model_config_pb2 import *  # noqa: F403

    health, reflection_v1, reflection_v1alpha = health_pb2, reflection_pb2, reflection_v1alpha_pb2
else:
    for _file in ("model_config.proto", "grpc_service.proto"):
        globals().update(_names(POOL.FindFileByName(_file)))
    health, reflection_v1, reflection_v1alpha = (
        SimpleNamespace(**dict(_names(POOL.FindFileByName(_file))))
        for _file in ("health.proto", "reflection.proto", "reflection_v1alpha.proto")
    )
