"""Inference requests known by their bytes: but for data and id, most of them say what others said.

A message's bytes before its raw contents, without the id, name one `Template`: what parsing and admitting them came to.
A request that begins like an earlier one is then cut up, not parsed, and its raw contents stay where they are.
"""

import numpy as np
from msgspec import Struct

from penstock import pb
from penstock.grpc_api.bodies import Body
from penstock.messages import InferRequest, RequestedOutput
from penstock.model_config import Signature
from penstock.tensor import BOOL, BYTES, Datatype, Tensor

KEPT = 256
KEY_BYTES = 4096
VIEW_BYTES = 16 << 10  # shorter raw contents are copied, which also aligns them; longer ones are views of the message


def _tag(field: str) -> int:
    """The byte before a length-delimited field of ModelInferRequest."""
    return pb.ModelInferRequest.DESCRIPTOR.fields_by_name[field].number << 3 | 2


RAW, ID = _tag("raw_input_contents"), _tag("id")
OTHERS = frozenset(map(_tag, ("model_name", "model_version", "parameters", "inputs", "outputs")))


class Parts(Struct):
    """A message, cut up."""

    key: bytes
    id: bytes
    raw: list[Body]


def cut(body: Body) -> Parts | None:
    """None for a message that is not as every client writes it: fields in order, raw contents at the end."""
    at, end = 0, len(body)
    id_begin = id_end = 0
    id = b""
    raw: list[Body] = []
    key = None
    try:
        while at < end:
            begin, tag = at, body[at]
            length = body[at + 1]
            at += 2
            if length & 0x80:
                length &= 0x7F
                shift = 7
                while True:
                    byte = body[at]
                    at += 1
                    length |= (byte & 0x7F) << shift
                    if byte < 0x80:
                        break
                    shift += 7
            if tag == RAW:
                if key is None:
                    if begin > KEY_BYTES:
                        return None
                    key = bytes(body[:id_begin]) + bytes(body[id_end:begin])
                part = body[at : at + length] if length < VIEW_BYTES else memoryview(body)[at : at + length]
                if len(part) < length:
                    return None
                raw.append(part)
            elif key is not None or (tag == ID and id_end):
                return None
            elif tag == ID:
                id_begin, id_end = begin, at + length
                id = bytes(body[at:id_end])
            elif tag not in OTHERS:
                return None
            at += length
    except IndexError:
        return None
    return Parts(key, id, raw) if key is not None and at == end else None


class Template(Struct, frozen=True):
    """What the requests of one key have in common."""

    model: str
    version: str
    signature: Signature  # that their tensors were admitted by; another makes the template void
    inputs: tuple[tuple[str, Datatype, tuple[int, ...], int], ...]  # the last is the number of bytes
    outputs: dict[str, RequestedOutput]
    rows: int
    priority: int
    timeout_us: int
    empty_final: bool
    size: int  # bytes of all inputs
    may_classify: bool

    def fill(self, parts: Parts) -> InferRequest | None:
        """The request that the message holds; None where its data is not what the key promises."""
        if len(parts.raw) != len(self.inputs):
            return None
        inputs = {}
        for raw, (name, datatype, shape, size) in zip(parts.raw, self.inputs, strict=True):
            if len(raw) != size:
                return None
            inputs[name] = Tensor(name, datatype, np.ndarray(shape, datatype.dtype, raw))
        try:
            id = parts.id.decode() if parts.id else ""
        except UnicodeDecodeError:
            return None
        return InferRequest(
            self.model, self.version, id, inputs, self.outputs, {}, self.priority, 0, self.timeout_us, None, self.rows,
            None, self.empty_final, self.size, self.may_classify,
        )  # fmt: skip


class Templates:
    """Those that were learnt. Used on one event loop."""

    def __init__(self) -> None:
        self._known: dict[bytes, Template] = {}

    def find(self, parts: Parts) -> Template | None:
        return self._known.get(parts.key)

    def learn(self, parts: Parts, request: InferRequest, signature: Signature) -> None:
        """Remember what a message came to, if others like it can be read by their bytes."""
        if request.sequence or request.parameters or len(parts.raw) != len(request.inputs):
            return
        inputs = []
        for raw, tensor in zip(parts.raw, request.inputs.values(), strict=True):
            # Elements of BYTES, and whether those of BOOL are 0 or 1, are not known before they are looked at.
            if tensor.datatype in (BYTES, BOOL) or tensor.array.nbytes != len(raw):
                return
            inputs.append((tensor.name, tensor.datatype, tensor.array.shape, len(raw)))
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[parts.key] = Template(
            request.model,
            request.version,
            signature,
            tuple(inputs),
            request.outputs,
            request.rows,
            request.priority,
            request.timeout_us,
            request.empty_final,
            sum(map(len, parts.raw)),
            any(wanted.classification for wanted in request.outputs.values()),
        )
