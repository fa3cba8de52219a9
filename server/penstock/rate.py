"""Resources and priorities that decide when an instance may start: `--rate-limit execution_count`."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from penstock.errors import Kind, ServingError
from penstock.model_config import RateLimit

GLOBAL = "global"  # the place of a resource that there is once for the whole server, and not for each device

Key = tuple[str, str]  # place and name of a resource


class Turn:
    """The right of one instance to run one batch. Fields are owned by the limiter's lock."""

    __slots__ = ("granted", "needs", "passed", "priority", "waits", "wake")

    def __init__(self, needs: Mapping[Key, int], priority: int, passed: int, wake: Callable[[], None]) -> None:
        self.needs = needs
        self.priority = priority
        self.passed = passed  # runs so far times the priority: the lower, the sooner is its next turn
        self.wake = wake  # called without a lock held, when the turn has come
        self.granted = False
        self.waits = False


class RateLimiter:
    """Gives turns to instances as far as their resources reach, of those that wait first to the one with most due.

    Of a resource there is what the command line says, else as much as the instance asks for that asks for most. An
    instance that waits for a resource is not overtaken by others that need the same one. Safe on any thread.
    """

    def __init__(self, stated: Mapping[Key, int]) -> None:
        """`stated` are amounts by place and name; place "" stands for all that are not named."""
        self._stated = stated
        self._turns: list[Turn] = []
        self._used: Counter[Key] = Counter()
        self._lock = threading.Lock()

    def enter(self, device: str, limit: RateLimit, wake: Callable[[], None]) -> Turn:
        """Let an instance on `device` take part. Raises ServingError(INVALID) if it could never run."""
        needs: Counter[Key] = Counter()
        for resource in limit.resources:
            needs[GLOBAL if resource.everywhere else device, resource.name] += resource.count
        for key, count in needs.items():
            stated = self._limit(key)
            if stated is not None and stated < count:
                raise ServingError(
                    Kind.INVALID,
                    f'Resource count for "{key[1]}" is limited to {stated} which will prevent scheduling of one or '
                    f"more model instances, the minimum required count is {count}",
                )
        with self._lock:
            # As if it had had as many turns as others, or it would have all of the next ones.
            turn = Turn(needs, limit.priority, min((turn.passed for turn in self._turns), default=0), wake)
            self._turns.append(turn)
            granted = self._grant()  # there may be more of a resource now
        for other in granted:
            other.wake()
        return turn

    def leave(self, turn: Turn) -> None:
        """The instance is closed."""
        with self._lock:
            self._turns.remove(turn)
        self.give_back(turn, ran=False)

    def take(self, turn: Turn) -> bool:
        """Whether the instance may run now. If not, it waits, and is woken once it may."""
        with self._lock:
            turn.waits = not turn.granted
            self._grant()
            return turn.granted

    def give_back(self, turn: Turn, ran: bool, again: bool = False) -> None:
        """The batch has ended, or there was none to run any more. Wakes those whose turn this makes it.

        `again`: it wants another turn, and is considered with the others.
        """
        with self._lock:
            turn.waits = again
            if turn.granted:
                turn.granted = False
                turn.passed += turn.priority if ran else 0
                self._used.subtract(turn.needs)
            granted = self._grant()
        for other in granted:
            other.wake()

    def _grant(self) -> list[Turn]:
        """Those that have their turn now and had not before. Holds the lock."""
        granted: list[Turn] = []
        kept: set[Key] = set()  # for those that wait in front
        for turn in sorted((turn for turn in self._turns if turn.waits), key=lambda turn: turn.passed):
            free = all(self._used[key] + count <= self._amount(key) for key, count in turn.needs.items())
            if free and kept.isdisjoint(turn.needs):
                turn.granted, turn.waits = True, False
                self._used.update(turn.needs)
                granted.append(turn)
            else:
                kept.update(turn.needs)
        return granted

    def _limit(self, key: Key) -> int | None:
        return self._stated.get(key, self._stated.get(("", key[1])))

    def _amount(self, key: Key) -> int:
        stated = self._limit(key)
        return max((turn.needs.get(key, 0) for turn in self._turns), default=0) if stated is None else stated


def parse(entries: Sequence[str]) -> dict[Key, int]:
    """Amounts from `NAME:COUNT[:DEVICE]`, where DEVICE is `global`, `cpu` or the number of a GPU; without, all of them.

    Raises ServingError(INVALID) for anything else.
    """
    amounts: dict[Key, int] = {}
    for entry in entries:
        name, _, rest = entry.partition(":")
        count, _, device = rest.partition(":")
        place = f"cuda:{device}" if device.isdigit() else device
        if not name or not count.isdigit() or place not in ("", GLOBAL, "cpu", f"cuda:{device}"):
            raise ServingError(Kind.INVALID, f"--rate-limit-resource expects NAME:COUNT[:DEVICE], got '{entry}'")
        amounts[place, name] = int(count)
    return amounts
