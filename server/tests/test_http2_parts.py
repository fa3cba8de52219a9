"""The parts of the HTTP/2 transport that are arithmetic: HPACK, messages, windows, allowances."""

import gzip
from random import Random

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.errors import Kind, ServingError
from penstock.grpc_api.http2.fields import FieldReader, literal
from penstock.grpc_api.http2.flow import WINDOW, Allowance, PingGuard, top_up
from penstock.grpc_api.http2.frames import Code, Fault
from penstock.grpc_api.http2.heads import error_block
from penstock.grpc_api.http2.messages import Assembler, decompress

from .http2_wire import message

names = st.one_of(
    st.sampled_from([":path", ":method", "content-type", "grpc-timeout", "x-id", "te"]),
    st.from_regex(r"[a-z0-9!#$%&'*+.^_`|~-]{1,30}", fullmatch=True),
)
values = st.text(st.characters(max_codepoint=255, exclude_characters="\0\r\n"), max_size=200)
lists = st.lists(st.tuples(names, values), max_size=12)


# -- HPACK


@settings(deadline=None)
@given(st.lists(st.tuples(lists, st.booleans(), st.integers(0, 2), st.sampled_from([None, None, 0, 100, 4096]))))
def test_any_block_of_the_library_s_encoder_is_read(
    blocks: list[tuple[list[tuple[str, str]], bool, int, int | None]],
) -> None:
    encoder, reader = hpack.Encoder(), FieldReader(1 << 20)
    for fields, huffman, sensitive, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        raw = [
            (hpack.NeverIndexedHeaderTuple if number % 3 < sensitive else hpack.HeaderTuple)(
                name.encode("latin-1"), value.encode("latin-1")
            )
            for number, (name, value) in enumerate(fields)
        ]
        assert reader.read(encoder.encode(raw, huffman=huffman)) == fields


def test_a_table_that_moved_is_told_from_one_that_stands_still() -> None:
    encoder, reader = hpack.Encoder(), FieldReader(1 << 20)
    first = encoder.encode([("x-a", "1")])
    again = encoder.encode([("x-a", "1")])
    reader.read(first)
    moved = reader.changes
    assert moved == 1
    assert reader.read(again) == [("x-a", "1")]
    assert reader.read(literal(b"x-b", b"2")) == [("x-b", "2")]
    assert reader.changes == moved
    encoder.header_table_size = 0
    reader.read(encoder.encode([]))
    assert reader.changes > moved


@pytest.mark.parametrize(
    ("block", "code"),
    [
        (b"\x80", Code.COMPRESSION_ERROR),  # index 0
        (b"\xbe", Code.COMPRESSION_ERROR),  # index 62 of an empty dynamic table
        (b"\xff", Code.COMPRESSION_ERROR),  # half an integer
        (b"\xff\xff\xff\xff\xff\xff\x01", Code.COMPRESSION_ERROR),  # too long an integer
        (b"\0\x03ab", Code.COMPRESSION_ERROR),  # half a string
        (b"\0\x7f\xff\xff\xff\x7f", Code.COMPRESSION_ERROR),  # a string of 256 MiB
        (b"\0\x81\xff\x01a", Code.COMPRESSION_ERROR),  # no Huffman code
        (b"\x3f\xe2\x1f", Code.COMPRESSION_ERROR),  # a table of 4097 bytes
        (b"\x88\x20", Code.COMPRESSION_ERROR),  # a table's size behind a field
        (literal(b"X", b""), Code.PROTOCOL_ERROR),
        (literal(b"", b""), Code.PROTOCOL_ERROR),
        (literal(b"a b", b""), Code.PROTOCOL_ERROR),
        (literal(b"a", b"\n"), Code.PROTOCOL_ERROR),
    ],
)
def test_a_block_that_is_none_is_told(block: bytes, code: Code) -> None:
    with pytest.raises(Fault) as caught:
        FieldReader(1 << 20).read(block)
    assert caught.value.code is code


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_a_fault(block: bytes) -> None:
    reader = FieldReader(1 << 20)
    try:
        fields = reader.read(block)
    except Fault:
        return
    assert fields is not None


def test_fields_over_the_limit_are_none_and_the_table_goes_on() -> None:
    encoder, reader = hpack.Encoder(), FieldReader(100)
    assert reader.read(encoder.encode([("x-a", "y" * 200), ("x-b", "1")])) is None
    assert reader.read(encoder.encode([("x-b", "1")])) == [("x-b", "1")]


def test_a_small_block_cannot_mean_much() -> None:
    encoder, reader = hpack.Encoder(), FieldReader(1 << 16)
    encoder.encode([("x-a", "y" * 4000)])
    reader.read(hpack.Encoder().encode([("x-a", "y" * 4000)]))
    assert reader.read(b"\xbe" * 60_000) is None


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 300, 5000])
def test_literals_of_any_length_are_the_library_s(size: int) -> None:
    [(name, value)] = hpack.Decoder().decode(literal(b"n" * size, b"v" * size)) if size else [("", "")]
    assert (name, value) == ("n" * size, "v" * size)


def test_a_status_message_is_percent_encoded() -> None:
    fields = dict(FieldReader(1000).read(error_block(ServingError(Kind.INVALID, "a%b\tü~"))) or ())
    assert fields == {"grpc-status": "3", "grpc-message": "a%25b%09%C3%BC~"}


# -- messages


@given(st.lists(st.tuples(st.binary(max_size=50), st.booleans()), max_size=8), st.integers(1, 60), st.randoms())
def test_messages_come_out_as_they_went_in_however_they_were_cut(
    sent: list[tuple[bytes, bool]], piece: int, random: Random
) -> None:
    stream = b"".join(message(body, compressed) for body, compressed in sent)
    assembler = Assembler(50)
    at = 0
    while at < len(stream):
        size = random.randint(1, piece)
        missing = assembler.missing
        assert missing > 0
        assembler.feed(memoryview(stream)[at : at + size])
        at += size
    assert [*assembler.ready] == [(compressed, body) for body, compressed in sent]
    assert assembler.between


def test_a_half_message_is_not_between_messages() -> None:
    assembler = Assembler(50)
    assembler.feed(b"\0\0\0")
    assert (assembler.between, assembler.missing) == (False, 2)
    assembler.feed(b"\0\7abc")
    assert (assembler.between, assembler.missing, len(assembler.ready)) == (False, 4, 0)


@pytest.mark.parametrize("behind", [b"x", gzip.compress(b"b")])
def test_bytes_behind_a_compressed_message_are_refused(behind: bytes) -> None:
    with pytest.raises(ServingError, match="it ends too early or too late"):
        decompress(gzip.compress(b"a") + behind, "gzip", 100)


# -- windows and allowances


@pytest.mark.parametrize(
    ("credit", "held", "missing", "more"),
    [
        (WINDOW, 0, 5, 0),
        (WINDOW // 2 + 1, 0, 5, 0),  # less than half is used
        (WINDOW // 2, 0, 5, WINDOW // 2),
        (WINDOW // 2, WINDOW // 2, 5, 0),  # nothing was taken
        (0, WINDOW, 5, 5),  # but the message that has begun must come
        (WINDOW - 10, 0, 4 * WINDOW, 3 * WINDOW + 10),
        (3 * WINDOW, 0, 5, 0),  # what was granted to a long message is not taken back
    ],
)
def test_a_window_grows_with_what_is_taken_and_for_a_message_that_has_begun(
    credit: int, held: int, missing: int, more: int
) -> None:
    assert top_up(credit, held, missing) == more


def test_an_allowance_is_used_up_and_comes_back() -> None:
    allowance = Allowance(3, 10)
    assert [allowance.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert allowance.take(100.25)
    assert not allowance.take(100.26)
    assert [allowance.take(999.0) for _ in range(4)] == [True, True, True, False]


def test_pings_that_come_too_early_are_strikes_and_answers_forgive_them() -> None:
    guard = PingGuard(interval_s=10, idle_interval_s=100, most=2)
    assert [guard.too_many(time, idle=False) for time in (0.0, 1.0, 2.0, 3.0)] == [False, False, False, True]
    guard.forgive()
    assert [guard.too_many(time, idle=False) for time in (4.0, 14.0, 24.0, 34.0)] == [False] * 4
    guard.forgive()
    assert [guard.too_many(time, idle=True) for time in (40.0, 60.0, 80.0, 99.0)] == [False, False, False, True]


def test_any_number_of_pings_may_come_where_strikes_do_not_count() -> None:
    guard = PingGuard(interval_s=10, idle_interval_s=100, most=0)
    assert not any(guard.too_many(0.0, idle=False) for _ in range(100))
