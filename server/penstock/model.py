"""One loaded version of a model: signature, scheduler, workers, counts."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from penstock import cache, classification, model_config, pb
from penstock.access import plain
from penstock.batching import DEPARTURES, Batcher
from penstock.cache import ResponseCache
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.instances import INLINE_LIMIT_NS, Crew
from penstock.messages import InferRequest, InferResponse
from penstock.model_config import RateLimit, Signature, TensorSpec
from penstock.queueing import Fifo, Missed, Pending, Scheduler
from penstock.rate import RateLimiter
from penstock.replies import InOrder, Whole
from penstock.runtime import Instance, Measured, ModelFiles, Pads, gpu_number
from penstock.sequencing import Sequencer
from penstock.statistics import FIRST_RESPONSE_MS, NO_GPU, Execution, Histogram, Outcome, Ran, Statistics
from penstock.tensor import BYTES, Tensor, objects

logger = logging.getLogger(__name__)

FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"  # the family whose buckets a model may choose
FIRST_RUN_LIMIT_NS = 20_000_000  # a model that takes longer for one row of nothing is not asked again
INLINE_CALLS = 8  # that may run one after the other, each for INLINE_LIMIT_NS, on the thread that brings a request
INLINE_CONCURRENCY = 64  # requests to have at hand where bringing one takes longer than running it
# Rows of the batch axis, and the size of every other open dimension; up to so many bytes together.
PROBES = ((1, 1), (8, 1), *((8, 16 << power) for power in range(18)))
PROBE_BYTES = 8 << 20

_loads = itertools.count()


class Loaded(Struct, frozen=True):
    """What a load found out, and nothing changes afterwards."""

    files: ModelFiles
    config: pb.ModelConfig  # complete, with the devices that were really got
    signature: Signature
    load_s: float
    members: tuple["Model", ...] = ()  # that it calls


class Model:
    """A version that can run. `submit` may be called on any thread."""

    def __init__(
        self,
        loaded: Loaded,
        instances: Sequence[Instance],
        response_cache: ResponseCache | None = None,
        limiter: RateLimiter | None = None,
        lose_device: "Callable[[Model, DeviceLostError], None] | None" = None,
    ) -> None:
        """`response_cache` is shared by all models; this one uses it if its configuration says so. So is `limiter`.
        `lose_device` is told of every answer that says that a GPU is lost, before that answer is sent.

        Raises ServingError if an instance needs more of a resource than there is, or cannot run sequences.
        """
        self.name = loaded.files.model
        self.version = str(loaded.files.version)
        self.config = loaded.config
        self.files = loaded.files
        self.signature = loaded.signature
        self.load_s = loaded.load_s
        self.members = loaded.members
        devices = [device for member in self.members for device in member.devices]
        self.devices: tuple[str, ...] = tuple(dict.fromkeys(devices or [instance.device for instance in instances]))
        self.decoupled = loaded.config.model_transaction_policy.decoupled
        self.batching = model_config.batch_policy(loaded.config)
        pads = [instance.padded for instance in instances if isinstance(instance, Pads)]
        self._cache = response_cache if loaded.config.response_cache.enable else None
        gpus = {gpu_number(instance.device) for instance in instances}
        self._statistics = Statistics(
            gpus={gpu: Ran() for gpu in sorted(gpus - {NO_GPU})},
            elsewhere=NO_GPU in gpus or self.caches,
            padded=tuple(padded for padded in pads if padded is not None),
        )
        self._blamed = "OTHER" if self.members else "BACKEND"  # for what instances answer: an ensemble computes nothing
        self._lose_device = lose_device
        self._statistics.histograms.first_response = Histogram(first_response_buckets(loaded.config))
        # A version that is loaded anew may answer otherwise, and so may one whose members are.
        self._fingerprint = cache.fingerprint(loaded.config, self.version) + next(_loads).to_bytes(8)
        sequencing = model_config.sequence_policy(loaded.config)
        self.sequencer = Sequencer(sequencing, len(instances), self._departures()) if sequencing else None
        stays_whole = sequencing is not None or instances[0].streams
        self._most_rows = 2**63 if stays_whole else self.signature.max_batch_size or 2**63  # of one execution
        policy = self.batching or sequencing
        self._in_order = InOrder() if policy and policy.preserve_ordering else None
        if sequencing and instances[0].streams:
            raise ServingError(
                Kind.UNSUPPORTED, f"model '{self.name}': sequence_batching needs a runtime that takes batches"
            )
        inline_bytes = self._probe(instances[0])
        for padded in self._statistics.padded:
            padded.data = padded.padding = 0  # what the probe and the warm-up ran is nothing that requests sent
        self._instances = tuple(instances)
        self.streams = any(instance.streams for instance in instances)  # it may answer more than once, or later
        self._crew = Crew(
            f"{self.name}-{self.version}",
            self._scheduler() if self.sequencer is None else self.sequencer,
            instances,
            self._finish,
            self._withdrawn,
            limiter if loaded.config.instance_group else None,  # an ensemble has no group, its members have
            _limits(loaded.config) if limiter else (),
            self._shaped,
            self._responded if self.decoupled else None,
        )
        self._crew.allow_inline(inline_bytes)
        if self.members and self.calls <= INLINE_CALLS:
            self._crew.start_inline()

    @property
    def statistics(self) -> Statistics:
        """The counts, of all that has ended."""
        self._statistics.fold()
        return self._statistics

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return self._crew.waiting

    @property
    def workers(self) -> int:
        """How many instances there are."""
        return len(self._instances)

    @property
    def ready_workers(self) -> int:
        """How many instances can run something now: one whose process is being replaced cannot."""
        return sum(instance.max_in_flight > 0 for instance in self._instances)

    @property
    def concurrency(self) -> int:
        """How many requests keep all instances busy: what each runs at a time, full batches, and more of short ones."""
        if self.members:
            return sum(member.concurrency for member in self.members)
        most = sum(
            instance.max_in_flight if instance.streams else max(1, self.signature.max_batch_size)
            for instance in self._instances
        )
        return most if self.inline_bytes < 0 else max(most, INLINE_CONCURRENCY)

    @property
    def depth(self) -> int:
        """How many models call one another below this one: 0 where it calls none."""
        return max((member.depth + 1 for member in self.members), default=0)

    @property
    def calls(self) -> int:
        """How many runs of models that call no others one request may take."""
        return sum(member.calls for member in self.members) if self.members else 1

    @property
    def running(self) -> int:
        """How many requests an instance has, or has taken."""
        return self._crew.running

    @property
    def memory_bytes(self) -> int:
        """Main memory that is this version's alone, as far as its instances can tell; 0 where none can."""
        return sum(instance.memory_bytes() for instance in self._instances if isinstance(instance, Measured))

    @property
    def draining(self) -> bool:
        """Whether nothing more is accepted: this version was replaced, is unloaded, or the server stops."""
        return self._crew.draining

    @property
    def inline_bytes(self) -> int:
        """The largest request, in bytes, that runs on the thread that brings it; -1 when none does."""
        return self._crew.inline_bytes

    def submit(self, pending: Pending, has_slot: bool = False) -> None:
        """Queue an admitted request, or run it at once. Raises ServingError if it cannot be accepted.

        `has_slot` says that its answer has its place in the order of answers already, where they have one.
        """
        if self._in_order is not None and not has_slot:
            self._submit_in_order(pending, self._in_order)
            return
        request = pending.request
        if self._cache is not None and not self.draining and self._answered(pending, self._cache):
            return
        if request.rows > self._most_rows:
            whole = Whole(pending, self._most_rows)
            pending.holder = whole
            self._crew.submit_all(whole.parts)
            return
        self._crew.submit(pending, request.size if request.size >= 0 else _size(request))

    def _submit_in_order(self, pending: Pending, order: InOrder) -> None:
        reply = pending.reply
        pending.reply = slot = order.slot(reply)
        try:
            self.submit(pending, has_slot=True)
        except ServingError:
            pending.reply = reply
            order.withdraw(slot)
            raise

    @property
    def caches(self) -> bool:
        """Whether answers are kept and given again to equal requests."""
        return self._cache is not None

    def _answered(self, pending: Pending, kept: ResponseCache) -> bool:
        """Answer from the cache, where it has the answer."""
        request = pending.request
        started_ns = time.monotonic_ns()
        key = cache.key(self._fingerprint, request)
        outputs = kept.get(key)
        lookup_ns = time.monotonic_ns() - started_ns
        if outputs is None:
            pending.missed = Missed(key, lookup_ns)
            return False
        self._statistics.hit(lookup_ns, started_ns - pending.arrived_ns)
        _send(pending, InferResponse(request.model, self.version, request.id, outputs))
        return True

    def _keep(self, missed: Missed, response: InferResponse, kept: ResponseCache) -> None:
        started_ns = time.monotonic_ns()
        kept.put(missed.key, response.outputs)
        self._statistics.missed(missed.lookup_ns, time.monotonic_ns() - started_ns)

    def _scheduler(self) -> Scheduler:
        if self.batching is None:
            return Fifo()
        return Batcher(self.batching, self._departures())

    def _departures(self) -> dict[str, int]:
        """The counter of batches by the reason why they leave, which is shown from now on."""
        self._statistics.departures = dict.fromkeys(DEPARTURES, 0)
        return self._statistics.departures

    def shares_gpu(self, other: "Model") -> bool:
        """Whether an error that cost `other` its GPU's context costs this version its own: each process has one.

        Runtimes are told apart, for one may run its models in processes of their own.
        """
        return self.config.backend == other.config.backend and any(device != "cpu" for device in self.devices)

    def seal(self) -> None:
        """The server is about to stop: what waits for a slot of a sequence gets one while it still can."""
        self._crew.seal()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing more and wait until all that was accepted is answered. False when time ran out."""
        return self._crew.drain(timeout_s)

    def close(self) -> None:
        """Release threads and devices. Call `drain` first."""
        self._crew.close()

    def _probe(self, instance: Instance) -> int:
        """The largest input, in bytes, that this model computes in less time than a hand-off to a worker costs.

        -1 for none. Only instances on the CPU that cannot call other models are asked, with zeros, which also warms
        the model up.
        """
        note = self.files.note
        if instance.streams or instance.device != "cpu":
            note("inline", "never", "only a model that runs on the CPU and answers at once can")
            return -1
        largest, reason = -1, ""
        for rows, size in PROBES:
            request = zeros(self.signature, rows, size)
            if _size(request) <= largest:
                continue
            if _size(request) > PROBE_BYTES:
                break
            fastest_ns = _fastest(instance, request)
            took = "failed" if fastest_ns is None else f"took {fastest_ns / 1000:.0f} us"
            reason = (
                f"zeros of {_size(request)} bytes {took}, a hand-off to a worker takes {INLINE_LIMIT_NS // 1000} us"
            )
            if fastest_ns is None or fastest_ns > INLINE_LIMIT_NS:
                break
            largest = _size(request)
        note("inline", f"up to {largest} bytes" if largest >= 0 else "never", reason)
        return largest

    def _finish(
        self, batch: Sequence[Pending], results: Sequence[InferResponse | ServingError], times: Execution
    ) -> None:
        """Turn what the instance gave into answers, count them, and send them."""
        if len(batch) == 1 and isinstance(first := results[0], InferResponse):  # nearly always: no lists for it
            [pending] = batch
            if pending.whole is None and pending.missed is None:
                request = pending.request
                answer = self._shaped(request, first)
                if isinstance(answer, InferResponse):
                    self._statistics.executed((pending.arrived_ns,), request.rows, times)
                    answer.computed = times
                else:
                    self._count_failure(answer, times.ended_ns - pending.arrived_ns, "OTHER")
                try:
                    pending.reply(answer)
                except Exception as error:  # noqa: BLE001 - as in `_send`
                    _not_sent(pending, error)
                return
        answers: list[tuple[Pending, InferResponse | ServingError]] = []
        arrivals_ns: list[int] = []
        rows = 0
        for pending, result in zip(batch, results, strict=True):
            answer = self._shaped(pending.request, result) if isinstance(result, InferResponse) else result
            if isinstance(answer, InferResponse):
                rows += pending.request.rows
                answer.computed = times
            part = pending
            if part.whole is not None:
                whole = part.whole.put(part, answer, times)
                if whole is None:
                    continue
                pending, answer = part.whole.pending, whole
            answers.append((pending, answer))
            if isinstance(answer, InferResponse):
                if part.whole is None:
                    arrivals_ns.append(pending.arrived_ns)
                else:
                    answer.computed = together = part.whole.times
                    self._statistics.joined(pending.arrived_ns, together)
                if pending.missed is not None and self._cache is not None:
                    self._keep(pending.missed, answer, self._cache)
            else:
                blamed = self._blamed if answer is result else "OTHER"
                self._count_failure(answer, times.ended_ns - pending.arrived_ns, blamed)
                if isinstance(answer, DeviceLostError) and self._lose_device is not None:
                    self._lose_device(self, answer)
        if arrivals_ns or rows:
            self._statistics.executed(arrivals_ns, rows, times)
        for pending, answer in answers:
            _send(pending, answer)

    def _shaped(self, request: InferRequest, response: InferResponse) -> InferResponse | ServingError:
        """The response as it leaves: with the version that ran, and the classes of outputs that were asked for."""
        response.version = self.version
        if request.outputs and request.may_classify:
            batched = self.signature.max_batch_size > 0
            for position, tensor in enumerate(response.outputs):
                wanted = request.outputs.get(tensor.name)
                if wanted and wanted.classification:
                    labels = self.signature.outputs[tensor.name].labels
                    try:
                        response.outputs[position] = classification.top(tensor, wanted.classification, labels, batched)
                    except ServingError as error:
                        return error
        return response

    def _withdrawn(self, pending: Pending, reason: ServingError) -> None:
        if pending.whole is not None:
            if pending.whole.put(pending, reason) is None:
                return
            pending = pending.whole.pending
        late = reason.kind is Kind.TIMED_OUT
        self._count_failure(reason, time.monotonic_ns() - pending.arrived_ns, "REJECTED" if late else "OTHER")
        _send(pending, reason)

    def _responded(self, place: int, result: InferResponse | ServingError, infer_ns: int, request_ns: int) -> None:
        outcome: Outcome = "success"
        if isinstance(result, ServingError):
            outcome = "cancel" if result.kind is Kind.CANCELLED else "fail"
        elif not result.outputs:
            outcome = "empty_response"
        self._statistics.responded(place, infer_ns, outcome, request_ns)

    def _count_failure(self, error: ServingError, ns: int, otherwise: str) -> None:
        gone = error.kind in (Kind.CANCELLED, Kind.DEADLINE)  # the client has cancelled, or waits no longer
        self._statistics.failed("CANCELED" if gone else otherwise, ns)


def _limits(config: pb.ModelConfig) -> list[RateLimit]:
    """Of each instance, in the order in which they were opened."""
    groups = [group for group in model_config.instance_groups(config) if not group.passive]
    return [group.rate_limit for group in groups for _ in range(group.count * max(1, len(group.gpus)))]


def first_response_buckets(config: pb.ModelConfig) -> tuple[float, ...]:
    """Milliseconds: the model's own, or Triton's."""
    chosen: tuple[float, ...] = FIRST_RESPONSE_MS
    for control in config.model_metrics.metric_control:
        family = control.metric_identifier.family
        if family == FIRST_RESPONSE:
            chosen = tuple(sorted(filter(math.isfinite, set(control.histogram_options.buckets))))
        else:
            logger.warning("model '%s': model_metrics of '%s' changes nothing: no such family can", config.name, family)
    return chosen


def _send(pending: Pending, answer: InferResponse | ServingError) -> None:
    """Reply. One that fails is its receiver's loss: it must not cost others their answers, nor a worker its thread."""
    try:
        pending.reply(answer)
    except Exception as error:  # noqa: BLE001 - it is logged
        _not_sent(pending, error)


def _not_sent(pending: Pending, error: Exception) -> None:
    request = pending.request
    id = plain(request.id or "<id_unknown>")
    logger.error("model %s: the reply to request %s failed", request.model, id, exc_info=error, extra=request.names)


def _size(request: InferRequest) -> int:
    """Bytes of all inputs; of BYTES, the eight of each reference and what its elements hold."""
    total = 0
    for tensor in request.inputs.values():
        total += tensor.array.nbytes
        if tensor.datatype is BYTES:
            total += sum(map(len, tensor.array.flat))
    return total


def zeros(signature: Signature, rows: int, size: int) -> InferRequest:
    """A request of zeros, as text where that is wanted: `rows` on the batch axis, `size` for other open dimensions."""
    batched = signature.max_batch_size > 0
    rows = min(rows, signature.max_batch_size) if batched else 1
    inputs = {spec.name: _zero(spec, rows, size, batched) for spec in signature.inputs.values() if not spec.optional}
    return InferRequest(signature.model, "", "", inputs, {}, rows=rows)


def _zero(spec: TensorSpec, rows: int, size: int, batched: bool) -> Tensor:
    shape = [size if dim < 0 else dim for dim in spec.shape]
    if batched:
        shape[0] = rows
    if spec.datatype is BYTES:
        return Tensor(spec.name, BYTES, objects([b"0"] * int(np.prod(shape)), shape))
    return Tensor(spec.name, spec.datatype, np.zeros(shape, spec.datatype.dtype))


def _fastest(instance: Instance, request: InferRequest) -> int | None:
    """Nanoseconds of the fastest of a few runs, or of the first if that was slow; None where the model cannot run."""
    times = [_time(instance, request)]
    if times[0] is not None and times[0] <= FIRST_RUN_LIMIT_NS:
        times += [_time(instance, request) for _ in range(5)]
    known = [ns for ns in times if ns is not None]
    return min(known) if len(known) == len(times) else None


def _time(instance: Instance, request: InferRequest) -> int | None:
    """Nanoseconds of one run; None where the model cannot run on this input."""
    started_ns = time.perf_counter_ns()
    try:
        [result] = instance.execute([request])
    except Exception as error:  # noqa: BLE001 - zeros may be no valid input; then nothing was learnt
        logger.debug("model %s: a run on zeros failed, so it never runs inline: %s", request.model, error)
        return None
    return None if isinstance(result, ServingError) else time.perf_counter_ns() - started_ns
