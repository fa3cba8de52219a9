"""Header fields in bytes: HPACK, RFC 7541.

`hpack` brings the static table and the Huffman code. The loop over a block is ours: the library's decoder takes five
times as long, and does not tell whether a block has changed the dynamic table, by which a block may be known again.
"""

import re

from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from penstock.grpc_api.http2.frames import Code, Fault

Field = tuple[str, str]

TABLE_BYTES = 4096  # HPACK's default, which we do not change
FIELD_OVERHEAD = 32  # bytes that a field counts for beside its name and value. RFC 7541, §4.1
STATIC: tuple[Field, ...] = (
    ("", ""),  # index 0 is none
    *((name.decode(), value.decode()) for name, value in HeaderTable.STATIC_TABLE),
)
LAST_STATIC = len(STATIC) - 1
NAME = re.compile(r":?[a-z0-9!#$%&'*+\-.^_`|~]+")  # capitals are malformed: RFC 9113, §8.2.1
NOT_IN_VALUES = re.compile(r"[\0\r\n]")


class FieldReader:
    """Reads the header blocks of one connection, in the order in which they came. Owns their dynamic table."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._dynamic: list[Field] = []  # the newest last
        self._dynamic_bytes = 0
        self._table_bytes = TABLE_BYTES
        self.changes = 0  # of the dynamic table: while it stands still, equal blocks mean the same

    def read(self, block: bytes) -> list[Field] | None:
        """The fields of a block; None where they exceed the limit.

        Raises Fault where the block is no HPACK, or a field holds characters that none may.
        """
        fields: list[Field] = []
        dynamic = self._dynamic
        at, end = 0, len(block)
        try:
            while at < end:
                first = block[at]
                at += 1
                if first & 0x80:  # an indexed field
                    index = first & 0x7F
                    if LAST_STATIC < index < 0x7F:
                        field = dynamic[LAST_STATIC - index]
                    else:
                        if index == 0x7F:
                            index, at = _integer(block, at, index)
                        field = self._entry(index)
                elif first & 0x40:  # a literal that enters the table
                    field, at = self._literal(block, at, first & 0x3F, 0x3F)
                    self._add(field)
                elif first & 0x20:  # a new size of the table
                    if fields:
                        raise Fault(Code.COMPRESSION_ERROR, "a table size behind a field")
                    size = first & 0x1F
                    if size == 0x1F:
                        size, at = _integer(block, at, size)
                    self._resize(size)
                    continue
                else:
                    field, at = self._literal(block, at, first & 0x0F, 0x0F)
                fields.append(field)
        except (IndexError, HPACKError) as error:
            raise Fault(Code.COMPRESSION_ERROR, "a header block that ends too early or holds no index") from error
        # Huffman's shortest code has 5 bits; an indexed field is no longer than the table.
        if len(fields) * (TABLE_BYTES + FIELD_OVERHEAD) + 2 * end <= self._limit_bytes:
            return fields
        size = sum([len(name) + len(value) + FIELD_OVERHEAD for name, value in fields])
        return fields if size <= self._limit_bytes else None

    def _entry(self, index: int) -> Field:
        if 0 < index <= LAST_STATIC:
            return STATIC[index]
        if not index:
            raise Fault(Code.COMPRESSION_ERROR, "index 0 in a header block")
        return self._dynamic[LAST_STATIC - index]

    def _literal(self, block: bytes, at: int, index: int, most: int) -> tuple[Field, int]:
        if index == most:
            index, at = _integer(block, at, most)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = _string(block, at)
            if not NAME.fullmatch(name):
                raise Fault(Code.PROTOCOL_ERROR, f"a header field cannot be called {name[:80]!r}")
        value, at = _string(block, at)
        if NOT_IN_VALUES.search(value):
            raise Fault(Code.PROTOCOL_ERROR, f"a control character in header field {name[:80]!r}")
        return (name, value), at

    def _add(self, field: Field) -> None:
        self.changes += 1
        self._dynamic.append(field)
        self._dynamic_bytes += len(field[0]) + len(field[1]) + FIELD_OVERHEAD
        if self._dynamic_bytes > self._table_bytes:
            self._evict()

    def _resize(self, size: int) -> None:
        if size > TABLE_BYTES:
            raise Fault(Code.COMPRESSION_ERROR, f"a header table of {size} bytes, {TABLE_BYTES} are allowed")
        self.changes += 1
        self._table_bytes = size
        self._evict()

    def _evict(self) -> None:
        gone = 0
        while self._dynamic_bytes > self._table_bytes:
            name, value = self._dynamic[gone]
            self._dynamic_bytes -= len(name) + len(value) + FIELD_OVERHEAD
            gone += 1
        del self._dynamic[:gone]


def literal(name: bytes, value: bytes) -> bytes:
    """A field that enters no table, so that it means the same on every connection at any time."""
    return b"\0" + _length(len(name)) + name + _length(len(value)) + value


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """The integer whose prefix, all ones, was `value`; and where it ends."""
    for shift in range(0, 28, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Fault(Code.COMPRESSION_ERROR, "an integer of more than four bytes in a header block")


def _string(block: bytes, at: int) -> tuple[str, int]:
    length = block[at]
    at += 1
    end = at + length
    if length < 0x7F and end <= len(block):
        return block[at:end].decode("latin-1"), end
    huffman = length & 0x80
    length &= 0x7F
    if length == 0x7F:
        length, at = _integer(block, at, length)
    end = at + length
    if end > len(block):
        raise IndexError
    raw = block[at:end]
    return (decode_huffman(raw) if huffman else raw).decode("latin-1"), end


def _length(number: int) -> bytes:
    """A string's length, its bytes being themselves and no Huffman code."""
    if number < 0x7F:
        return bytes((number,))
    number -= 0x7F
    digits = bytearray((0x7F,))
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
