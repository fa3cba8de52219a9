"""The job API of one server: its store, worker, outbox and door, started and stopped in order."""

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from penstock import oip_json
from penstock.engine import Engine
from penstock.errors import ServingError
from penstock.job_api import metrics
from penstock.job_api.app import Check, JobApp
from penstock.job_api.batches import Batches
from penstock.job_api.desk import Desk, Terms
from penstock.job_api.endpoints import is_endpoint, why_not
from penstock.job_api.journal import Journal, JournalHandler
from penstock.job_api.rates import Rates
from penstock.job_api.runpod import RunPod
from penstock.job_api.store import Counts, JobStore, open_store
from penstock.job_api.tensorone import TensorOne
from penstock.job_api.webhooks import Outbox
from penstock.job_api.worker import Sizes, Worker
from penstock.settings import Settings

logger = logging.getLogger(__name__)

OFF = "none"  # as --job-store: no job API


class JobService:
    """Everything that the job API needs while the server runs. `app` is its door. Lives on one event loop."""

    def __init__(
        self, engine: Engine, settings: Settings, store: JobStore, where: str, check: Check | None = None
    ) -> None:
        """Takes `store` over; `where` names it to people. Raises ServingError(INVALID) for a setting that is wrong."""
        self.where = where
        self._engine = engine
        self._store = store
        self._journal = Journal()
        sizes = Sizes(settings.job_max_run_size, settings.job_max_runsync_size)
        limits = oip_json.Limits(settings.http_max_input_size, settings.max_tensors, settings.max_rank)
        self._worker = Worker(engine, store, sizes, limits, self._journal, self._poke)
        terms = Terms(
            settings.job_execution_timeout_secs * 1000,
            settings.job_ttl_secs * 1000,
            settings.job_retention_secs * 1000,
            settings.job_sync_retention_secs * 1000,
            settings.job_policy_bounds,
            settings.job_queue_limit,
            settings.webhook_allow_private,
        )
        self._desk = Desk(engine, store, self._worker, self._journal, terms, sizes, limits, self._poke)
        runpod = RunPod(self._desk, Batches(self._desk), settings.job_echo_input, settings.job_gpu)
        tensorone = TensorOne(self._desk)
        self._outbox = Outbox(
            store,
            {"runpod": runpod.webhook, "tensorone": tensorone.webhook},
            self._journal,
            settings.webhook_allow_private,
            settings.webhook_secret,
        )
        self.app = JobApp(runpod, tensorone, Rates(settings.job_rate_limit), check)
        self._handler = JournalHandler(self._journal)
        self._warned: set[str] = set()
        self._unwatch: Callable[[], None] = lambda: None
        self._posting: asyncio.Task[None] | None = None

    def _poke(self) -> None:
        self._outbox.poke()

    async def start(self) -> None:
        """Take up the jobs that are in the store. Raises ServingError(UNAVAILABLE) where that fails."""
        logging.getLogger().addHandler(self._handler)
        loop = asyncio.get_running_loop()

        def models_changed() -> None:
            loop.call_soon_threadsafe(self._warn)

        self._unwatch = self._engine.lifecycle.watch(models_changed)
        self._warn()
        await self._worker.start()
        self._posting = asyncio.create_task(self._outbox.run())

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, answer those who wait with how things stand, and let running jobs end.

        Those that do not in `grace_s` go back to the queue.
        """
        self._desk.close()
        await self._worker.stop(grace_s)

    async def close(self) -> None:
        """Release the store, once nobody asks for jobs any more. Call `stop` first."""
        self._unwatch()
        logging.getLogger().removeHandler(self._handler)
        if self._posting is not None:
            self._posting.cancel()
            await asyncio.gather(self._posting, return_exceptions=True)
        await self._store.close()

    async def metrics(self) -> bytes:
        """What the metrics port shows of jobs: models that are served, and others that had jobs."""
        served = [model.name for model in self._engine.lifecycle.models()]
        try:
            counted = await self._store.totals()
        except ServingError as error:
            logger.warning("metrics of jobs: %s", error.message)
            return metrics.render(None, self._outbox.attempts)
        names = sorted({name for name in (*served, *counted) if is_endpoint(name)})
        return metrics.render({name: counted.get(name, Counts()) for name in names}, self._outbox.attempts)

    def _warn(self) -> None:
        """Say which models that are served have no job door, and why; each once."""
        for model in self._engine.lifecycle.models():
            reason = why_not(model.name)
            if reason and model.name not in self._warned:
                self._warned.add(model.name)
                logger.warning("model '%s' has no job door: %s", model.name, reason)


async def open_service(
    engine: Engine, settings: Settings, check: Check | None = None, environment: Mapping[str, str] = os.environ
) -> JobService | None:
    """The job API as the settings want it; None where it is switched off.

    Raises ServingError where the store that was named cannot be opened. One that nobody named is done without, with a
    warning: a server on a read-only disk serves inference all the same.
    """
    where = settings.job_store
    if where == OFF:
        return None
    if where:
        store = await open_store(where)
    else:
        path = default_path(settings, environment)
        where = f"sqlite:{path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            store = await open_store(where)
        except (OSError, ServingError) as error:
            logger.warning("no job API: cannot keep jobs in '%s' (%s); --job-store names another place", path, error)
            return None
    try:
        return JobService(engine, settings, store, where, check)
    except ServingError:
        await store.close()
        raise


def default_path(settings: Settings, environment: Mapping[str, str]) -> Path:
    """Where jobs lie when nobody says so: one file for each set of model repositories and port, found again after a
    restart.
    """
    state = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME") or "~").expanduser() / ".local/state")
    names = sorted(str(Path(path).resolve()) for path in settings.model_repository)
    key = hashlib.sha256("\0".join([*names, str(settings.http_port)]).encode()).hexdigest()[:12]
    return Path(state) / "penstock" / f"jobs-{key}.db"
