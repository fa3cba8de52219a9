"""Text format and JSON ↔ `pb.ModelConfig`."""

import json
import math
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from penstock import pb
from penstock.errors import Kind, ServingError

DESCRIPTOR: Descriptor = pb.POOL.FindMessageTypeByName("inference.ModelConfig")


def read(path: Path) -> pb.ModelConfig:
    """The configuration in a file: JSON where its name ends in `.json`, text format otherwise.

    Raises ServingError(INVALID) with line and column if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(Kind.INVALID, f"failed to read text proto from {path}: {error}") from error
    return read_json(text, str(path)) if path.suffix == ".json" else read_text(text, str(path))


def read_text(text: str, source: str) -> pb.ModelConfig:
    """Parse protobuf text format. `source` is what an error calls the text."""
    config = pb.ModelConfig()
    try:
        text_format.Parse(text, config, descriptor_pool=pb.POOL)
    except text_format.ParseError as error:
        where = re.sub(r"^(\d+):(\d+) : ", r"line \1, column \2: ", str(error))
        raise ServingError(Kind.INVALID, f"failed to read text proto from {source}: {where}") from error
    return config


def read_json(text: str | bytes, source: str) -> pb.ModelConfig:
    """Parse the JSON form: names in snake_case or camelCase, enums in any case, 64-bit integers as numbers or strings.

    Raises ServingError(INVALID) for anything else, a field that does not exist or stands twice among it.
    """
    config = pb.ModelConfig()
    try:
        document = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(document, dict):
            raise json_format.ParseError(f"expected an object, got {type(document).__name__}")
        json_format.ParseDict(_folded(document, DESCRIPTOR), config)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ServingError(Kind.INVALID, f"failed to read JSON configuration from {source}: {where}") from error
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]  # the lines below list every field there is
        raise ServingError(Kind.INVALID, f"failed to read JSON configuration from {source}: {reason}") from error
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise json_format.ParseError(f"field '{twice}' is given more than once")
    return members


def _folded(members: dict[str, Any], message: Descriptor) -> dict[str, Any]:
    """The same JSON with the names of enum values in upper case, as protobuf spells them."""
    fields = {name: field for field in message.fields for name in (field.name, field.json_name)}
    return {name: _folded_value(value, fields.get(name)) for name, value in members.items()}


def _folded_value(value: Any, field: FieldDescriptor | None) -> Any:
    if field is None:
        return value
    if isinstance(value, list):
        return [_folded_value(item, field) for item in value]
    if isinstance(value, str):
        return value.upper() if field.enum_type else value
    if isinstance(value, dict) and field.message_type:
        if field.message_type.GetOptions().map_entry:
            item_field = field.message_type.fields_by_name["value"]
            return {key: _folded_value(item, item_field) for key, item in value.items()}
        return _folded(value, field.message_type)
    return value


def to_text(config: pb.ModelConfig) -> str:
    """The configuration in protobuf text format, as a `config.pbtxt` has it."""
    return text_format.MessageToString(config, use_short_repeated_primitives=True)


def to_json(message: Message) -> dict[str, Any]:
    """The JSON form of a configuration: declaration order, snake_case names, enums by name, 64-bit integers as numbers.

    Scalars and lists appear even at their default; messages and members of a oneof only where they are set.
    """
    return {
        field.name: _json(field, getattr(message, field.name))
        for field in cast(Descriptor, message.DESCRIPTOR).fields
        if not field.has_presence or message.HasField(field.name)
    }


def _json(field: FieldDescriptor, value: Any) -> Any:
    if not field.is_repeated:
        return _json_item(field, value)
    if field.message_type and field.message_type.GetOptions().map_entry:
        item_field = field.message_type.fields_by_name["value"]
        return {str(key): _json_item(item_field, value[key]) for key in sorted(value)}
    return [_json_item(field, item) for item in value]


def _json_item(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type:
        return to_json(value)
    if field.enum_type:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        # The shortest decimal that is this float: 0.1, not 0.10000000149011612.
        return float(str(np.float32(value))) if field.type == FieldDescriptor.TYPE_FLOAT else value
    return value
