"""Jobs and webhooks as Prometheus text, from the job store's counters when it is scraped."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from msgspec import Struct

from penstock.job_api.store import Counts, State

# How an attempt at a webhook went: received, to be made again, or the last one in vain.
DELIVERED, FAILED, GIVEN_UP = "delivered", "failed", "given_up"

Attempts: TypeAlias = Mapping[tuple[str, str], int]  # by endpoint and result
Series: TypeAlias = Iterable[tuple[str, float]]  # labels besides the model's, as they stand in the text; and the value


class Family(Struct, frozen=True):
    """One metric of every endpoint."""

    name: str
    type: str
    help: str
    read: Callable[[Counts], Series]


def _states(**counted: Callable[[Counts], int]) -> Callable[[Counts], Series]:
    return lambda counts: ((f',state="{State[name].value}"', read(counts)) for name, read in counted.items())


# The store's, which every server that shares it shows alike.
FAMILIES = (
    Family(
        "penstock_jobs",
        "gauge",
        "Jobs in the store that wait or run",
        _states(IN_QUEUE=lambda counts: counts.in_queue, IN_PROGRESS=lambda counts: counts.in_progress),
    ),
    Family(
        "penstock_jobs_accepted_total",
        "counter",
        "Jobs that were accepted since the store began",
        lambda counts: (("", counts.accepted),),
    ),
    Family(
        "penstock_jobs_ended_total",
        "counter",
        "Jobs that ended since the store began, by the state that they ended in",
        _states(
            COMPLETED=lambda counts: counts.completed,
            FAILED=lambda counts: counts.failed,
            CANCELLED=lambda counts: counts.cancelled,
            TIMED_OUT=lambda counts: counts.timed_out,
        ),
    ),
    Family(
        "penstock_jobs_retried_total",
        "counter",
        "Returns to the queue since the store began: retried by a client, or because a worker was lost",
        lambda counts: (("", counts.retried),),
    ),
)
ATTEMPTS = "penstock_jobs_webhook_attempts_total"
UP = "penstock_jobs_store_up"


def render(counted: Mapping[str, Counts] | None, attempts: Attempts) -> bytes:
    """The text. `counted` holds the counters of every endpoint, None where the store cannot be reached."""
    return "".join((*_store_lines(counted), *_webhook_lines(counted or {}, attempts))).encode()


def _store_lines(counted: Mapping[str, Counts] | None) -> Iterator[str]:
    yield _head(UP, "gauge", "Whether the job store answers")
    yield f"{UP} {int(counted is not None)}\n"
    for family in FAMILIES if counted else ():
        yield _head(family.name, family.type, family.help)
        for endpoint, counts in (counted or {}).items():
            for labels, value in family.read(counts):
                yield f'{family.name}{{model="{endpoint}"{labels}}} {value}\n'


def _webhook_lines(counted: Mapping[str, Counts], attempts: Attempts) -> Iterator[str]:
    endpoints = dict.fromkeys([*counted, *(endpoint for endpoint, _ in attempts)])
    if endpoints:
        yield _head(ATTEMPTS, "counter", "Attempts at webhooks that this server has made, by what came of them")
    for endpoint in endpoints:
        for result in (DELIVERED, FAILED, GIVEN_UP):
            value = attempts.get((endpoint, result), 0)
            yield f'{ATTEMPTS}{{model="{endpoint}",result="{result}"}} {value}\n'


def _head(name: str, type: str, help: str) -> str:
    return f"# HELP {name} {help}\n# TYPE {name} {type}\n"
