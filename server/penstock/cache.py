"""Answers that are given again to equal requests: a local cache, bounded by bytes."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from time import monotonic_ns

from msgspec import Struct

from penstock import pb
from penstock.messages import InferRequest
from penstock.statistics import Duration
from penstock.tensor import BYTES, Tensor, pack

ENTRY_BYTES = 512  # of an entry besides its tensors' data: key, names, objects


def fingerprint(config: pb.ModelConfig, version: str) -> bytes:
    """What distinguishes the answers of one version from those of all others: name, version, whole configuration."""
    text = config.SerializeToString(deterministic=True)
    return hashlib.blake2b(f"{config.name}\0{version}\0".encode() + text, digest_size=32).digest()


def key(fingerprint: bytes, request: InferRequest) -> bytes:
    """What requests have equal that are answered alike: inputs by name, shape, datatype and bytes; outputs asked for.

    Id, parameters and priority change no answer.
    """
    digest = hashlib.blake2b(fingerprint, digest_size=32)
    for name in sorted(request.inputs):
        tensor = request.inputs[name]
        digest.update(f"{name}\0{tensor.datatype.name}{tensor.array.shape}".encode())
        digest.update(pack(tensor.array, tensor.datatype))
    for output in request.outputs.values():
        digest.update(f"\0{output.name}\0{output.classification}".encode())
    return digest.digest()


class Counts(Struct):
    """What the cache did since the server started. Owned by its lock."""

    lookup: Duration
    insertion: Duration
    hits: int = 0
    misses: int = 0
    evictions: int = 0


class ResponseCache:
    """Outputs by key, the least recently used forgotten first. Safe on any thread."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self.counts = Counts(Duration(), Duration())
        self._entries: OrderedDict[bytes, tuple[list[Tensor], int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> list[Tensor] | None:
        """The outputs that were put there; the list is the caller's, the arrays are not to be written to."""
        started_ns = monotonic_ns()
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self.counts.hits += 1
            else:
                self.counts.misses += 1
            self.counts.lookup.add(monotonic_ns() - started_ns)
        return list(entry[0]) if entry is not None else None

    def put(self, key: bytes, outputs: Sequence[Tensor]) -> None:
        """Keep copies of the outputs, where they fit."""
        started_ns = monotonic_ns()
        size = ENTRY_BYTES + sum(map(_size, outputs))
        if size > self.size_bytes:
            return
        copies = [Tensor(tensor.name, tensor.datatype, tensor.array.copy()) for tensor in outputs]
        with self._lock:
            if key not in self._entries:
                while self.used_bytes + size > self.size_bytes:
                    _, (_, freed) = self._entries.popitem(last=False)
                    self.used_bytes -= freed
                    self.counts.evictions += 1
                self._entries[key] = (copies, size)
                self.used_bytes += size
            self.counts.insertion.add(monotonic_ns() - started_ns)


def _size(tensor: Tensor) -> int:
    """Bytes that a tensor holds; of BYTES, the references and what they refer to, about 40 bytes more for each."""
    extra = sum(len(element) + 40 for element in tensor.array.flat) if tensor.datatype is BYTES else 0
    return int(tensor.array.nbytes) + extra
