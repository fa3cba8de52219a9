"""The one kind of failure that a client is told about, and the closed set of its kinds."""

from enum import Enum


class Kind(Enum):
    """Whose fault it was and whether to try again. Each door maps every kind to its own status."""

    INVALID = "Invalid argument"
    UNAUTHENTICATED = "Unauthenticated"
    FORBIDDEN = "Forbidden"
    NOT_FOUND = "Not found"
    EXISTS = "Already exists"
    TOO_LARGE = "Too large"
    LIMITED = "Limited"
    UNAVAILABLE = "Unavailable"
    TIMED_OUT = "Timed out"
    DEADLINE = "Deadline exceeded"
    CANCELLED = "Cancelled"
    UNSUPPORTED = "Unsupported"
    INTERNAL = "Internal"

    @property
    def title(self) -> str:
        """The kind as the repository index prints it before a message, such as `Invalid argument`."""
        return self.value


class ServingError(Exception):
    """A request or a load that failed: its kind, and a message that says what was expected and what came."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type["ServingError"], tuple[Kind, str]]:
        return ServingError, (self.kind, self.message)


class DeviceLostError(ServingError):
    """A device failed so that nothing in this process can use it any more: INTERNAL, and only a new process helps."""

    def __init__(self, message: str) -> None:
        super().__init__(Kind.INTERNAL, message)

    def __reduce__(self) -> tuple[type["DeviceLostError"], tuple[str]]:  # type: ignore[override]
        return DeviceLostError, (self.message,)


class WorkerLostError(ServingError):
    """The process that ran a request has ended before it answered: UNAVAILABLE, to be tried again.

    `blamed` says that this request was the one that ran when the process crashed; otherwise the process was ended for
    the sake of another request, and this one has done nothing to deserve it.
    """

    def __init__(self, message: str, blamed: bool) -> None:
        super().__init__(Kind.UNAVAILABLE, message)
        self.blamed = blamed

    def __reduce__(self) -> tuple[type["WorkerLostError"], tuple[str, bool]]:  # type: ignore[override]
        return WorkerLostError, (self.message, self.blamed)
