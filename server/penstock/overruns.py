"""Runs on threads that others wait for, ended where they last too long."""

import threading
from time import monotonic_ns

from penstock.errors import Kind, ServingError
from penstock.runtime import Cancelled

LIMIT_NS = 50_000_000  # an event loop that stands still for longer is noticed by all of its clients
REST_AFTER = 40  # looks without a run in between, at two in LIMIT_NS


class Track:
    """Where runs follow one another. What tells the one that it lasts too long serves the next, too: most are short."""

    __slots__ = ("guard", "since_ns")

    def __init__(self) -> None:
        self.guard = Cancelled()
        self.since_ns = 0  # when the run began that is on its way; 0: none is


class Overruns:
    """Says to each run that it is unwanted once it has lasted for LIMIT_NS.

    A model may compute for microseconds on one input, and for minutes on another. One thread looks, which starts with
    the first run and sleeps while there are none: a timer for each would cost more than the run. Safe on any thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracks: list[Track] = []
        self._seen = False  # whether a run began since the last look
        self._resting = True
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def track(self) -> Track:
        """For runs of which each begins when the one before it has ended."""
        track = Track()
        self._tracks.append(track)
        return track

    def begin(self, track: Track, now_ns: int) -> Cancelled:
        """What tells a run that begins that it lasts too long. When it has ended, `since_ns` is to be set to 0."""
        guard = track.guard
        # One that runs before have left watchers on, each its own, would keep them for ever.
        if guard.reason is not None or (guard.watchers and len(guard.watchers) > 1):
            guard = track.guard = Cancelled()
        track.since_ns = now_ns
        self._seen = True
        if self._resting:
            self._rouse()
        return guard

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _rouse(self) -> None:
        with self._lock:
            self._resting = False
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name=self._name, daemon=True)
                self._thread.start()

    def _watch(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            quiet = 0
            while quiet < REST_AFTER:
                if self._closed.wait(LIMIT_NS / 2e9):
                    return
                quiet = 0 if self._seen or any(track.since_ns for track in self._tracks) else quiet + 1
                self._seen = False
                self.look(monotonic_ns())
            with self._lock:
                self._resting = not self._seen  # else one began just now, and has found this awake
                if not self._resting:
                    self._wake.set()

    def look(self, now_ns: int) -> None:
        """End the runs that have lasted too long. If one ends by itself just now, the next may be ended instead."""
        for track in self._tracks:
            guard, since_ns = track.guard, track.since_ns
            if since_ns and now_ns - since_ns > LIMIT_NS:
                guard.set(ServingError(Kind.INTERNAL, "the run was ended, for others wait for its thread"))
