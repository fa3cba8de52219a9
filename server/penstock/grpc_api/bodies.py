"""Messages in bytes: as they came, and as they leave."""

from typing import TypeAlias

Body: TypeAlias = bytes | memoryview  # a message as it came; memory that nobody changes
Encoded: TypeAlias = bytes | list[Body]  # a message as it leaves: whole, or in pieces that were not copied together


def length(message: Encoded) -> int:
    return len(message) if isinstance(message, bytes) else sum(map(len, message))


def whole(message: Encoded) -> bytes:
    return message if isinstance(message, bytes) else b"".join(message)
