"""The model table: which versions are served, in what state the others are, and how they come and go."""

import functools
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from msgspec import Struct, field, structs

from penstock import members, model_config, pb, rate, repository, warmup
from penstock.cache import ResponseCache
from penstock.devices import cpu_count, gpu_count
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.members import Members, Needs
from penstock.model import Loaded, Model
from penstock.model_config import ENSEMBLE, Note, unheard
from penstock.rate import RateLimiter
from penstock.repository import ModelSource
from penstock.runtime import Find, Instance, ModelFiles, Placement, Runtime, find
from penstock.settings import Settings
from penstock.statistics import Summaries

logger = logging.getLogger(__name__)

UNLOADED = "unloaded"  # the reason of a version that is unavailable because that was asked for
MOST_THREADS = 16  # of one instance by default: few models gain from more, and other models want cores too


class State(Enum):
    """Of a version, as the repository index prints it."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class Record(Struct, eq=False):
    """A version that was loaded, or that was to be. Compared by identity."""

    state: State
    reason: str = ""
    model: Model | None = None  # while READY or UNLOADING
    ending: str = UNLOADED  # the reason once it is unloaded


class Entry(Struct):
    """A model by name. Owned by the table's lock; `operation` makes its loads and unloads wait for each other."""

    versions: dict[int, Record] = field(default_factory=dict)
    failure: str = ""  # why the last load failed before any version was known
    fingerprint: dict[str, int] = field(default_factory=dict)  # of what was loaded last; owned by `operation`
    origin: tuple[ModelSource, pb.ModelConfig] | None = None  # what serves, or shall once it can; None: nothing shall
    operation: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_ready(self) -> bool:
        """Whether all that was to be served is: no version failed, is loading or is unloading."""
        return (bool(self.versions) or not self.failure) and all(
            record.state is State.READY or (record.state is State.UNAVAILABLE and record.reason == UNLOADED)
            for record in self.versions.values()
        )


class Lifecycle:
    """Loads, finds and unloads models.

    `get` is two dictionary look-ups without a lock: `_serving` is replaced as a whole when something changes. All else
    is owned by one lock. A new version becomes visible in one assignment once it is warm; the one it replaces drains.
    """

    def __init__(self, settings: Settings, find: Find = find) -> None:
        self._settings = settings
        self._roots = [Path(path) for path in settings.model_repository]
        self._entries: dict[str, Entry] = {}
        self._serving: dict[str, dict[str, Model]] = {}  # name → version, or "" for the highest that is READY
        self._retiring: set[Record] = set()  # replaced or unloaded, and not yet drained
        self._lock = threading.Lock()
        self._lent: Counter[Model] = Counter()  # to models that call them
        self._given_back = threading.Condition(self._lock)
        self._watchers: dict[object, Callable[[], None]] = {}
        self._started = False
        self._exiting = False
        self._device_lost = ""  # why no model can run on a GPU any more, until this process ends
        workers = settings.model_load_thread_count
        self._models_pool = ThreadPoolExecutor(workers, thread_name_prefix="load-model")
        self._versions_pool = ThreadPoolExecutor(workers, thread_name_prefix="load-version")
        size_bytes = settings.cache_bytes()
        self.cache = None if size_bytes is None else ResponseCache(size_bytes)
        amounts = rate.parse(settings.rate_limit_resource)
        self._limiter = RateLimiter(amounts) if settings.rate_limit == "execution_count" else None
        self._find_runtime = find
        self._runtimes: dict[str, Runtime] = {}
        self._runtimes_lock = threading.Lock()  # of its own, for it is held while a runtime is imported

    # -- asking

    def get(self, name: str, version: str = "") -> Model:
        """The READY version that serves `name`; the highest where `version` is "". Raises ServingError."""
        try:
            return self._serving[name][version]
        except KeyError:
            return self._find(name, version)

    def _find(self, name: str, version: str) -> Model:
        """What `get` answers where the quick look-up has failed: a version written differently, or the refusal."""
        number = parse_version(version)
        with self._lock:
            entry = self._entries.get(name)
            records = dict(entry.versions) if entry else {}
        subject = f"Request for unknown model: '{name}'"
        if not records:
            raise ServingError(Kind.NOT_FOUND, f"{subject} is not found")
        if number is None:
            raise ServingError(Kind.NOT_FOUND, f"{subject} has no available versions")
        record = records.get(number)
        if record is None:
            raise ServingError(Kind.NOT_FOUND, f"{subject} version {number} is not found")
        if record.model is None or record.state is not State.READY:
            raise ServingError(Kind.UNAVAILABLE, f"{subject} version {number} is not at ready state")
        return record.model

    def ready_versions(self, name: str) -> list[str]:
        """The versions of a model that are served, ascending; [] for an unknown one."""
        return sorted((version for version in self._serving.get(name, {}) if version), key=int)

    def knows(self, name: str) -> bool:
        """Whether a model of this name was ever to be loaded, served or not."""
        return name in self._entries

    def states(self, name: str) -> list[State]:
        """The states of all versions of a model that were ever to be served; a load that failed early is one more."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return []
            states = [record.state for record in entry.versions.values()]
            return states or ([State.UNAVAILABLE] if entry.failure else [])

    def models(self) -> list[Model]:
        """Every version that is served, by name and version."""
        serving = self._serving
        return [model for name in sorted(serving) for version, model in serving[name].items() if version]

    def index(self) -> list[tuple[str, int | None, State | None, str]]:
        """(name, version, state, reason) of all that lies in the repositories now, as the index extension lists it.

        A model that was never loaded, or whose loads failed before a version was known, has its name only.
        """
        rows: list[tuple[str, int | None, State | None, str]] = []
        sources = self._scan()
        with self._lock:
            for name in sorted(sources):
                entry = self._entries.get(name)
                if len(sources[name]) > 1:
                    rows.append((name, None, State.UNAVAILABLE, "model appears in two or more repositories"))
                elif entry is None or not entry.versions:
                    rows.append((name, None, None, ""))
                else:
                    for number, record in sorted(entry.versions.items()):
                        rows.append((name, number, record.state, record.reason))
        return rows

    def failures(self) -> dict[str, str]:
        """Why models are not served that were to be, by name."""
        with self._lock:
            found = {}
            for name, entry in self._entries.items():
                if entry.failure and not entry.versions:
                    found[name] = entry.failure
                for number, record in entry.versions.items():
                    if record.state is State.UNAVAILABLE and record.reason != UNLOADED:
                        found.setdefault(name, f"version {number}: {record.reason}")
        return found

    def is_live(self) -> bool:
        """Whether the server has started and is not on its way out."""
        return self._started and not self._exiting

    def is_ready(self) -> bool:
        """Whether the server may be sent work. With strict readiness, no model may be failed, loading or unloading."""
        if not self.is_live():
            return False
        if not self._settings.strict_readiness:
            return True
        with self._lock:
            return all(entry.is_ready for entry in self._entries.values())

    @property
    def exiting(self) -> bool:
        return self._exiting

    @property
    def device_lost(self) -> str:
        """Why no model can run on a GPU any more; "" while that is not so."""
        return self._device_lost

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed`, on any thread, after each change of a state. Returns the function that ends that."""
        key = object()
        with self._lock:
            self._watchers[key] = changed

        def end() -> None:
            with self._lock:
                self._watchers.pop(key, None)

        return end

    def _notify(self) -> None:
        with self._lock:
            watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher()

    # -- loading

    def start(self) -> None:
        """Load what the control mode asks for, in parallel; returns when all is done. Failures are in `failures`.

        Raises ServingError(NOT_FOUND) where a repository does not exist.
        """
        sources = self._scan()
        if not sources:
            where = ", ".join(f"'{root}'" for root in self._roots)
            logger.warning(
                "NO MODEL IN %s: expected .onnx files, or a directory per model with version directories in it "
                "(such as my_model/1/model.onnx)", where,
            )  # fmt: skip
        names: Collection[str] = sources
        if self._settings.model_control_mode == "explicit" and self._settings.load_model != ("*",):
            names = dict.fromkeys(self._settings.load_model)
        self._load_all(names, sources)
        self._started = True
        self._notify()

    def load(self, name: str) -> None:
        """Load or reload a model from disk; returns when it serves. What served before does so until then.

        Raises ServingError with the texts of the repository extension.
        """
        if self._exiting:
            raise ServingError(Kind.UNAVAILABLE, "Server not ready")
        if error := self._load_all([name], self._scan()).get(name):
            raise error

    def unload(self, name: str) -> None:
        """Stop serving a model. Returns at once: accepted requests finish first. Unknown names are none too many."""
        with self._lock:
            entry = self._entries.get(name)
        if entry is None:
            return
        with entry.operation:
            entry.origin = None
            with self._lock:
                retired = [record for record in entry.versions.values() if record.state is State.READY]
                self._publish(name, entry, retired)
            self._release(name, retired)
        self._follow([name])

    def lose_device(self, lost: Model, error: DeviceLostError) -> None:
        """End the versions that shared a GPU's context with the one that lost it; what runs on the CPU goes on.

        Called on the thread that ran the request, which gets its answer before this version is released.
        """
        gone: dict[str, list[Record]] = {}
        with self._lock:
            first = not self._device_lost
            self._device_lost = self._device_lost or error.message
            for name, entry in self._entries.items():
                for record in entry.versions.values():
                    if record.state is State.READY and record.model is not None and record.model.shares_gpu(lost):
                        gone.setdefault(name, []).append(record)
            for name, records in gone.items():
                self._publish(name, self._entries[name], records)
                for record in records:
                    record.state = State.UNAVAILABLE
                    record.reason = record.ending = error.message
        if first:
            logger.error("%s; %s. Only a new process can use it again", error.message, _ended(gone))
        for name, records in gone.items():
            self._release(name, records)
        self._notify()
        if gone:  # on a thread of its own: what calls those models is opened anew, or retires
            threading.Thread(target=self._follow, args=(list(gone),), name="follow-lost-device", daemon=True).start()

    def seal(self) -> None:
        """A stop has been asked for, and what was accepted is being answered. Called before `stop`."""
        for model in self.models():
            model.seal()

    def stop(self, timeout_s: float) -> bool:
        """Refuse new work, finish what was accepted, release all models. False when time ran out first."""
        self._exiting = True
        self._notify()
        deadline_s = time.monotonic() + timeout_s
        models = members.last_first(self.models())
        with self._lock:  # models that drain already close on threads of their own
            retiring = [record.model for record in self._retiring if record.model is not None]
        accepting = members.last_first([*models, *retiring])  # what was accepted still needs those that it calls
        drained = [model.drain(max(0.0, deadline_s - time.monotonic())) for model in accepting]
        self._models_pool.shutdown(wait=False, cancel_futures=True)
        self._versions_pool.shutdown(wait=False, cancel_futures=True)
        if all(drained):
            for model in models:
                self._close(model)
        return all(drained)

    def _scan(self) -> dict[str, list[ModelSource]]:
        return repository.scan(self._roots, self._settings.model_config_name)

    def _load_all(self, names: Collection[str], sources: dict[str, list[ModelSource]]) -> dict[str, Exception]:
        """Load these models and all that they call, those first that others call. What failed, by name."""
        failed: dict[str, Exception] = {}
        needs = self._needs(sources)
        asked, loaded = set(names), list[str]()
        for group in members.levels(names, needs):
            there = [name for name in group if name in sources or name in asked]
            loads = {name: self._models_pool.submit(self._load, name, sources, needs) for name in there}
            for name, load in loads.items():
                error = load.exception()
                if error is None:
                    loaded += [name] if load.result() else []
                    continue
                assert isinstance(error, Exception)
                failed[name] = error
                if isinstance(error, ServingError):
                    logger.error("%s", error.message.strip())
                else:
                    logger.error("loading model '%s' failed", name, exc_info=error)
                    self._fail(name, f"{type(error).__name__}: {error}")
        self._follow(loaded, tried=failed)
        return failed

    def _needs(self, sources: dict[str, list[ModelSource]]) -> Needs:
        """Which models each model calls, by the configurations on disk."""

        @functools.cache
        def needs(name: str) -> Collection[str]:
            try:
                return members.named(self._read(name, sources[name])[1]) if name in sources else ()
            except ServingError:
                return ()  # its load says what is wrong

        return needs

    def _follow(self, changed: Iterable[str], tried: Collection[str] = ()) -> None:
        """Let models that call changed ones call what serves now; those that cannot any more are not served.

        Those that were `tried` just now, and do not serve, would only fail again.
        """
        with self._lock:
            origins = {name: entry.origin for name, entry in self._entries.items()}
        needs = {name: members.named(origin[1]) for name, origin in origins.items() if origin is not None}
        for name in members.dependents(changed, needs):
            entry = self._entries[name]
            with entry.operation:
                serves = name in self._serving
                if (name in tried and not serves) or self._exiting or entry.origin is None:
                    continue
                if self._calls_what_serves(entry, entry.origin[1]):
                    continue
                try:
                    self._replace(name, entry, *entry.origin, keep=False)
                except ServingError as error:
                    logger.warning("%s", error.message.strip())

    def _calls_what_serves(self, entry: Entry, config: pb.ModelConfig) -> bool:
        """Whether the entry serves, and calls the very models that would be lent to it now."""
        serving = self._serving
        wanted = {serving.get(name, {}).get(version) for name, version in members.called(config)}
        ready = [record.model for record in entry.versions.values() if record.state is State.READY]
        return bool(ready) and all(model is not None and set(model.members) == wanted for model in ready)

    def _lend(self, borrower: str, name: str, version: str) -> Model:
        """A version for a model that calls it: it is kept until that one is closed. Raises ServingError(INVALID)."""
        with self._lock:
            found = self._serving.get(name, {})
            if version in found:
                self._lent[found[version]] += 1
                return found[version]
            entry = self._entries.get(name)
            reasons = [record.reason for record in entry.versions.values()] if entry else []
            failure = next((reason for reason in reasons if reason not in ("", UNLOADED)), "")
            depends = f"ensemble '{borrower}' depends on '{name}'"
            if found:
                text = f"{depends} whose required version {version} is not loaded."
            elif failure:
                text = f"{depends} which has no loaded version. Model '{name}' loading failed with error: {failure}"
            elif entry is not None and entry.failure and not entry.versions:
                text = f"{depends} which is not valid. Model '{name}' failed with error: {entry.failure}"
            else:
                text = f"{depends} which has no loaded version."
        raise ServingError(Kind.INVALID, text)

    def _give_back(self, models: Iterable[Model]) -> None:
        with self._lock:
            self._lent.subtract(Counter(models))
            self._given_back.notify_all()

    def _close(self, model: Model) -> None:
        model.close()
        self._give_back(model.members)

    def _load(self, name: str, sources: dict[str, list[ModelSource]], needs: Needs) -> bool:
        """Load one model, whose members have been loaded. False where nothing has changed on disk."""
        refused = f"failed to load '{name}', failed to poll from model repository"
        if name not in sources:
            if not self._started:  # later, a client asks for what was never heard of, and nothing has failed
                where = ", ".join(f"'{root}'" for root in self._roots) or "no repository"
                self._fail(name, f"no model '{name}' in {where}")
            raise ServingError(Kind.NOT_FOUND, refused)
        with self._lock:
            entry = self._entries.setdefault(name, Entry())
        with entry.operation:
            try:
                origin = source, config = self._read(name, sources[name])
                serves = any(record.state is State.READY for record in entry.versions.values())
                if not serves:  # else that is what shall go on to serve, if this fails
                    entry.origin = origin
                _check_members(name, sources, needs)
                prints = source.fingerprint()
            except (ServingError, OSError) as error:
                self._fail(name, str(error))
                raise ServingError(Kind.INVALID, f"{refused}: {error}") from error
            if prints == entry.fingerprint and serves:
                return False
            self._replace(name, entry, source, config)
            entry.origin = origin
            entry.fingerprint = prints
            return True

    def _fail(self, name: str, reason: str) -> None:
        """Record that a load failed before any version was known."""
        with self._lock:
            self._entries.setdefault(name, Entry()).failure = reason
        self._notify()

    def _read(self, name: str, found: Sequence[ModelSource]) -> tuple[ModelSource, pb.ModelConfig]:
        """The one source of a model, and its configuration as it is on disk."""
        if len(found) > 1:
            places = " and ".join(str(source.directory) for source in found)
            raise ServingError(Kind.INVALID, f"model appears in two or more repositories: {places}")
        [source] = found
        if source.config is None and self._settings.disable_auto_complete_config:
            raise ServingError(Kind.INVALID, f"model '{name}' has no config.pbtxt, and auto-completion is switched off")
        config = model_config.read(source.config) if source.config else pb.ModelConfig()
        if config.name and config.name != name:
            raise ServingError(
                Kind.INVALID,
                f"unexpected directory name '{name}' for model '{config.name}', directory name must equal model name",
            )
        return source, config

    def _replace(self, name: str, entry: Entry, source: ModelSource, config: pb.ModelConfig, keep: bool = True) -> None:
        """Load all versions of the policy or none, then swap them in.

        Where that fails, what served before goes on to do so if `keep` says so.
        """
        numbers = wanted_versions(source.versions, config.version_policy)
        if missing := sorted(set(config.version_policy.specific.versions) - source.versions.keys()):
            logger.warning("model '%s': its version policy names versions %s, which do not exist", name, missing)
        if not numbers:
            reason = f"at least one version must be available under the version policy of model '{name}'"
            self._fail(name, reason)
            raise ServingError(Kind.INVALID, f"load failed for model '{name}': {reason}\n")
        with self._lock:
            entry.failure = ""
            for number in numbers:
                record = entry.versions.get(number)
                if record is None or record.state is not State.READY:
                    entry.versions[number] = Record(State.LOADING)
        self._notify()
        opening = {number: self._versions_pool.submit(self._open, source, config, number) for number in numbers}
        opened: dict[int, Model] = {}
        failed: dict[int, ServingError] = {}
        for number, future in opening.items():
            error = future.exception()
            if error is None:
                opened[number] = future.result()
            elif isinstance(error, ServingError):
                failed[number] = error
            else:
                logger.error("loading model '%s' version %d failed", name, number, exc_info=error)
                failed[number] = ServingError(Kind.INTERNAL, f"{type(error).__name__}: {error}")
        if failed:
            self._reject(name, entry, opened, failed, keep)
        with self._lock:
            retired = [record for record in entry.versions.values() if record.state is State.READY]
            for number, model in opened.items():
                entry.versions[number] = Record(State.READY, model=model)
            self._publish(name, entry, retired)
        self._release(name, retired)

    def _reject(
        self, name: str, entry: Entry, opened: dict[int, Model], failed: dict[int, ServingError], keep: bool
    ) -> None:
        """Discard what was opened beside a version that failed, and raise with the reasons of those."""
        for model in opened.values():
            self._close(model)
        reasons = {number: f"{error.kind.title}: {error.message}" for number, error in failed.items()}
        with self._lock:
            for number, record in list(entry.versions.items()):
                if record.state is State.LOADING:
                    if number in reasons:
                        entry.versions[number] = Record(State.UNAVAILABLE, reasons[number])
                    else:
                        del entry.versions[number]
            retired = [] if keep else [record for record in entry.versions.values() if record.state is State.READY]
            for record in retired:
                record.ending = next(iter(reasons.values()))
            self._publish(name, entry, retired)
        self._release(name, retired)
        states = "".join(f"version {number} is at UNAVAILABLE state: {reason};" for number, reason in reasons.items())
        raise ServingError(Kind.INVALID, f"load failed for model '{name}': {states}\n")

    def _publish(self, name: str, entry: Entry, retired: Iterable[Record]) -> None:
        """Make the READY versions of a name, less those that retire, the ones that `get` finds. Holds the lock."""
        for record in retired:
            record.state = State.UNLOADING
        self._retiring.update(retired)
        ready = {
            number: record.model
            for number, record in entry.versions.items()
            if record.state is State.READY and record.model is not None
        }
        serving = dict(self._serving)
        serving.pop(name, None)
        if ready:
            serving[name] = {str(number): model for number, model in sorted(ready.items())}
            serving[name][""] = ready[max(ready)]
        self._serving = serving

    def _release(self, name: str, records: Sequence[Record]) -> None:
        """Let versions that are no longer served finish what they accepted, each on a thread of its own."""
        self._notify()
        for record in records:
            threading.Thread(target=self._retire, args=(record,), name=f"unload-{name}", daemon=True).start()

    def _retire(self, record: Record) -> None:
        model = record.model
        assert model is not None
        with self._lock:
            self._given_back.wait_for(lambda: not self._lent[model])  # what those who call it have accepted, needs it
        model.drain()
        self._close(model)
        with self._lock:
            del self._lent[model]
            record.model = None
            record.state = State.UNAVAILABLE
            record.reason = record.ending
            self._retiring.discard(record)
        self._notify()

    # -- opening one version

    def _open(self, source: ModelSource, config: pb.ModelConfig, number: int) -> Model:
        started_s = time.monotonic()
        path = source.versions[number]
        files = ModelFiles(source.name, number, source.directory, path)
        gpus = usable_gpus(self._settings.device)
        stated = _choose_file(config, path, files.note)
        stated = model_config.identify(stated, source.name, _filenames(path), files.note)
        for warning in model_config.refuse_unsupported(stated):
            logger.warning("%s", warning)
        model_config.validate(stated, gpus)
        places = place(stated, self._settings.device, gpus, cpu_count(), files.note)
        if self._device_lost and any(placement.device == "cuda" for placement in places):
            raise ServingError(Kind.UNAVAILABLE, f"{self._device_lost}; the server must be started anew")
        runtime = self._runtime(stated.backend or stated.platform)
        done = stated
        if not self._settings.disable_auto_complete_config:
            done = runtime.complete(files, stated, places[0])
        done = model_config.normalise(done, gpus, files.note)
        model_config.validate(done, gpus, complete=True)
        instances: list[Instance] = []
        host = Members(functools.partial(self._lend, source.name))
        try:
            for placement in places:
                opened = runtime.open(files, done, placement, host if members.named(done) else None)
                instances.append(opened)  # kept if the next fails
            files.kept.clear()
            done = show_devices(done, [instance.device for instance in instances], files.note)
            labels = files.labels | {
                output.name: repository.read_labels(source.directory, output.label_filename, output.name, source.name)
                for output in done.output
                if output.label_filename
            }
            signature = model_config.signature(done, labels)
            if model_config.splits_oversized(stated):
                signature = structs.replace(signature, row_limit=2**31)
            elif not stated.max_batch_size:  # nobody asked for a limit: it was completed, and only bounds a batch
                signature = structs.replace(signature, row_limit=2**31)
                if done.max_batch_size:
                    files.note(
                        "rows of a request", "any number", "max_batch_size was completed: it bounds batches alone"
                    )
            if done.response_cache.enable and self.cache is None:
                logger.warning("model '%s' asks for the response cache, which needs --cache-config", source.name)
            warmup.run(done, signature, source.directory, instances)
            took_s = time.monotonic() - started_s
            loaded = Loaded(files, done, signature, took_s, tuple(host.models))
            model = Model(loaded, instances, self.cache, self._limiter, self.lose_device)
            if self._settings.metrics_options()["summary_latencies"]:
                model.statistics.summaries = Summaries(self._settings.summary_quantiles())
            return model
        except BaseException:
            for instance in instances:
                instance.close()
            self._give_back(host.models)
            raise

    def _runtime(self, name: str) -> Runtime:
        with self._runtimes_lock:
            if name not in self._runtimes:
                self._runtimes[name] = self._find_runtime(name, self._settings.runtime_settings(name))
            return self._runtimes[name]


def _ended(records: dict[str, list[Record]]) -> str:
    return f"no longer served: {', '.join(sorted(records)) or 'none'}"


def _check_members(name: str, sources: Mapping[str, Sequence[ModelSource]], needs: Needs) -> None:
    """Raises ServingError(INVALID) where a model calls others that do not exist, or in the end itself."""
    if circle := members.circle(name, needs):
        raise ServingError(Kind.INVALID, f"circular dependency between ensembles: {' -> '.join(circle)}")
    if missing := [needed for needed in needs(name) if len(sources.get(needed, ())) != 1]:
        raise ServingError(
            Kind.INVALID, f"ensemble {name} contains models that are not available or ambiguous: {', '.join(missing)}"
        )


def _filenames(path: Path) -> list[str]:
    """The names in a version's directory; a bare model file stands for the default name, if it is no handler file."""
    if path.is_file():
        return [path.name if path.name in repository.HANDLERS else repository.DEFAULT_FILENAME]
    return sorted(os.listdir(path))


def _choose_file(config: pb.ModelConfig, path: Path, note: Note) -> pb.ModelConfig:
    """Name the one ONNX file of a version's directory where nothing else says which file to serve."""
    named = pb.ModelConfig()
    named.CopyFrom(config)
    if not (config.default_model_filename or config.platform) and config.backend in ("", "onnxruntime"):
        names = _filenames(path)
        models = [name for name in names if name.endswith(".onnx")]
        if repository.DEFAULT_FILENAME not in names and len(models) == 1:
            named.backend = "onnxruntime"
            named.default_model_filename = models[0]
            for field in ("backend", "default_model_filename"):
                note(field, getattr(named, field), f"{models[0]} is the only ONNX file of the version")
    return named


def parse_version(version: str) -> int | None:
    """A version as clients write it; None for "". Leading digits suffice, as in Triton.

    Raises ServingError(INVALID) for anything else.
    """
    if not version:
        return None
    found = re.match(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]*)", version)
    assert found is not None  # every part may be empty
    sign, digits = found.groups()
    if not found[0][-1:].isdigit() or len(digits) > 19 or int(digits or "0") > 2**63 - 1:
        raise ServingError(
            Kind.INVALID,
            f"failed to get model version from specified version string '{version}' (details: stol), "
            "version should be an integral value > 0",
        )
    if sign == "-" and digits:
        raise ServingError(
            Kind.INVALID,
            f"invalid model version specified '{version}' , version should be an integral value > 0",
        )
    return int(digits or "0")


def wanted_versions(available: Iterable[int], policy: pb.ModelVersionPolicy) -> list[int]:
    """The versions that a policy loads, ascending. No policy: the highest."""
    numbers = sorted(available)
    match policy.WhichOneof("policy_choice"):
        case "all":
            return numbers
        case "specific":
            return [number for number in numbers if number in set(policy.specific.versions)]
        case "latest":
            return numbers[-policy.latest.num_versions :] if policy.latest.num_versions else []
    return numbers[-1:]


def usable_gpus(device: str) -> list[int]:
    """The GPUs that models may use: none with `--device cpu`, else those that the driver shows."""
    return [] if device == "cpu" else list(range(gpu_count()))


def place(
    config: pb.ModelConfig, device: str, gpus: Sequence[int], cores: int, note: Note = unheard
) -> list[Placement]:
    """Where each instance of a valid configuration goes, in the order of its groups.

    KIND_AUTO follows `device`: with "auto" it may fall back to the CPU, with "cuda" it may not. Threads are shared out
    so that the instances of a model together use the machine's cores once. Raises ServingError(UNAVAILABLE) where CUDA
    was asked for and the driver shows no GPU. `note` is told which devices and threads were chosen, and why.
    """
    if config.platform == ENSEMBLE:
        note("device", "none", "an ensemble computes nothing itself")
        note("threads", 0, "its members have threads of their own")
        return [Placement("cpu")]
    asked = [group.kind for group in config.instance_group] or [pb.ModelInstanceGroup.KIND_AUTO]
    if config.instance_group and all(group.passive for group in config.instance_group):
        raise ServingError(Kind.INVALID, f"every instance group of model '{config.name}' is passive, so none would run")
    places: list[Placement] = []
    reasons: list[str] = []
    for kind, group in zip(asked, model_config.normalise(config, gpus).instance_group, strict=True):
        if group.passive:
            continue
        leaves_open = kind == pb.ModelInstanceGroup.KIND_AUTO
        if not leaves_open:
            reasons.append(f"an instance group says {pb.ModelInstanceGroup.Kind.Name(kind)}")
        elif gpus or device == "cpu":
            reasons.append(f"the configuration leaves it open and --device is {device}")
        else:
            reasons.append("the NVIDIA driver shows no GPU")
        if group.kind == pb.ModelInstanceGroup.KIND_GPU:
            for gpu in group.gpus:
                places += [Placement("cuda", gpu, may_fall_back=leaves_open and device == "auto")] * group.count
        elif leaves_open and device == "cuda":
            raise ServingError(
                Kind.UNAVAILABLE,
                f"model '{config.name}' was to run on cuda, but the NVIDIA driver shows no GPU"
                " (libcuda.so.1 is missing or finds no device); use --device auto or --device cpu to run on the CPU",
            )
        else:
            places += [Placement("cpu")] * group.count
    threads = max(1, min(MOST_THREADS, cores // len(places)))
    note("device", ", ".join(dict.fromkeys(map(str, places))), " and ".join(dict.fromkeys(reasons)))
    shared = f"{cores} cores are shared out among {len(places)} instances, at most {MOST_THREADS} to each"
    note("threads", threads, shared)
    return [structs.replace(where, threads=threads) for where in places]


def show_devices(config: pb.ModelConfig, devices: Sequence[str], note: Note = unheard) -> pb.ModelConfig:
    """The configuration with the kind of device that each group really got."""
    done = pb.ModelConfig()
    done.CopyFrom(config)
    first = 0
    for index, group in enumerate(done.instance_group):
        if group.passive:
            continue
        got = devices[first : first + group.count * max(1, len(group.gpus))]
        first += len(got)
        if group.kind == pb.ModelInstanceGroup.KIND_GPU and all(device == "cpu" for device in got):
            group.kind = pb.ModelInstanceGroup.KIND_CPU
            group.count = len(got)
            del group.gpus[:]
            for field, value in (("kind", "KIND_CPU"), ("count", group.count), ("gpus", "none")):
                note(f"instance_group[{index}].{field}", value, "its instances fell back to the CPU")
    return done
