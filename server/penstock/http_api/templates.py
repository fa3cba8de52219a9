"""Inferences known by their JSON: but for data and id, most of them say what others said, and so do their answers.

The JSON before binary tensors, without its id, names one `Template`: what reading and admitting it came to. A request
with the same JSON is not read again, and its tensors are views of its body.
"""

from collections.abc import Sequence

import numpy as np
import orjson
from msgspec import Struct
from msgspec.structs import replace

from penstock import oip_json
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.model import Model
from penstock.model_config import Signature
from penstock.oip_json import Decoded, Forms, NonFinite
from penstock.tensor import BOOL, BYTES, Datatype, Tensor, pack

KEPT = 256
KEY_BYTES = 4096
COPIED_BYTES = 1024  # for so little, a copy costs less than a view
ID = b'{"id":"'


class Template(Struct, frozen=True):
    """What the requests of one key have in common."""

    signature: Signature  # that their tensors were admitted by; another makes the template void
    id: str  # where it is not cut out
    inputs: tuple[tuple[str, Datatype, tuple[int, ...], int], ...]  # the last is how many bytes of data come before
    data_bytes: int
    outputs: dict[str, RequestedOutput]
    forms: Forms
    rows: int
    priority: int
    timeout_us: int
    may_classify: bool


class Templates:
    """Those that were learnt. Used on one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        """Longer JSON is never known, so that its length is checked each time."""
        self._most = min(limit_bytes, KEY_BYTES)
        self._known: dict[tuple[str, str, bytes], Template] = {}

    def read(self, model: Model, body: bytes | memoryview, json_bytes: int) -> tuple[InferRequest, Forms] | None:
        """The request that a body holds; None where its JSON is not known, or its data is not what that promises."""
        if json_bytes > self._most:
            return None
        text = bytes(body[:json_bytes])
        template, id = self._known.get((model.name, model.version, text)), None
        if template is None:
            id, key = _cut(text)
            if id is not None:
                template = self._known.get((model.name, model.version, key))
        if (
            template is None
            or template.signature is not model.signature
            or template.data_bytes != len(body) - json_bytes
        ):
            return None
        inputs = {}
        for name, datatype, shape, at in template.inputs:
            inputs[name] = Tensor(name, datatype, np.ndarray(shape, datatype.dtype, body, json_bytes + at))
        return (
            InferRequest(
                model.name, model.version, template.id if id is None else id, inputs, template.outputs, {},
                template.priority, 0, template.timeout_us, None, template.rows, None, False, template.data_bytes,
                template.may_classify,
            ),
            template.forms,
        )  # fmt: skip

    def learn(
        self, model: Model, body: bytes | memoryview, json_bytes: int, decoded: Decoded, request: InferRequest
    ) -> None:
        """Remember what a body came to, if others like it can be read by their bytes."""
        if json_bytes > self._most or request.sequence or request.parameters:
            return
        id, key = _cut(bytes(body[:json_bytes]))
        if id is not None and (b'"id"' in key or b"\\" in key):
            return  # there may be another id, and the last one counts
        inputs, at = [], 0
        for given in decoded.given:
            tensor = request.inputs[given.name]
            # Elements of BYTES, and whether those of BOOL are 0 or 1, are not known before they are looked at.
            if tensor.datatype in (BYTES, BOOL) or not isinstance(given.data, memoryview) or not len(given.data):
                return
            inputs.append((given.name, tensor.datatype, tensor.array.shape, at))
            at += len(given.data)
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[model.name, model.version, key] = Template(
            model.signature, decoded.id, tuple(inputs), at, request.outputs, decoded.forms, request.rows,
            request.priority, request.timeout_us, any(wanted.classification for wanted in request.outputs.values()),
        )  # fmt: skip


def _cut(text: bytes) -> tuple[str | None, bytes]:
    """The id that JSON begins with, as most clients write it, and the rest; None and all of it where it is not so.

    An id that is empty is none: the next request has the same.
    """
    if text.startswith(ID):
        begin = len(ID)
        end = text.find(b'"', begin)
        raw = text[begin:end]
        if end > begin and raw.isascii():
            id = raw.decode("ascii")
            if id.isprintable() and "\\" not in id:
                return id, text[end:]
    return None, text


class Heads:
    """The JSON before the binary tensors of answers, which says what others said but for the id. Used as above."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], bytes] = {}

    def encode(
        self, response: InferResponse, forms: Forms, non_finite: NonFinite
    ) -> tuple[int | None, list[bytes | memoryview]]:
        """As `oip_json.encode`."""
        shown: list[object] = [response.model, response.version]
        for tensor in response.outputs:
            name, array = tensor.name, tensor.array
            shown += (name, tensor.datatype, array.dtype, array.shape, forms.named.get(name, forms.default))
        key = tuple(shown)
        rest = self._known.get(key)
        if rest is None or response.parameters:
            json_bytes, buffers = oip_json.encode(response, forms, non_finite)
            if _is_known_by_head(response, buffers):
                self._learn(key, response, forms, non_finite)
            return json_bytes, buffers
        head = b'{"id":%b,%b' % (orjson.dumps(response.id), rest) if response.id else b"{" + rest
        buffers = [head]
        for tensor in response.outputs:
            array = tensor.array
            buffers.append(array.tobytes() if array.nbytes <= COPIED_BYTES else pack(array, tensor.datatype))
        return len(head), buffers

    def _learn(self, key: tuple[object, ...], response: InferResponse, forms: Forms, non_finite: NonFinite) -> None:
        _, [head, *_] = oip_json.encode(replace(response, id=""), forms, non_finite)
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[key] = bytes(head[1:])


def _is_known_by_head(response: InferResponse, buffers: Sequence[bytes | memoryview]) -> bool:
    """Whether an answer has nothing but tensors, each in binary and as long as datatype and shape say."""
    tensors = response.outputs
    return (
        not response.parameters
        and len(buffers) == len(tensors) + 1 > 1
        and all(tensor.datatype is not BYTES and tensor.array.dtype == tensor.datatype.dtype for tensor in tensors)
    )
