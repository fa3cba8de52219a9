"""Which request headers and metadata become parameters of a request."""

import re
from collections.abc import Iterable

from penstock.errors import Kind, ServingError

# Request parameters with a meaning of their own, which no forwarded header may take.
RESERVED = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)


class HeaderPattern:
    """Which headers are forwarded: those in whose name the pattern is found, in either case unless it says `(?-i)`."""

    def __init__(self, pattern: str, flag: str) -> None:
        """Raises ServingError(INVALID) naming `flag` where the pattern is no regular expression."""
        case = pattern.startswith("(?-i)")  # RE2's way to ask for case to count; Python knows it for groups only
        try:
            self._pattern = re.compile(pattern.removeprefix("(?-i)"), 0 if case else re.IGNORECASE)
        except re.error as error:
            raise ServingError(Kind.INVALID, f"{flag} is no regular expression: {error}: '{pattern}'") from error
        self.any = bool(pattern)  # whether anything can be forwarded

    def chosen(self, headers: Iterable[tuple[str | bytes, str | bytes]]) -> dict[str, str]:
        """The parameters that these headers become. Raises ServingError(INVALID) for a reserved name."""
        if not self.any:
            return {}
        found: dict[str, str] = {}
        for raw, value in headers:
            name = _text(raw)
            if self._pattern.search(name):
                if name in RESERVED or name.startswith("triton_"):
                    raise ServingError(
                        Kind.INVALID, f"Header '{name}' is reserved for Triton usage and cannot be forwarded."
                    )
                found[name] = _text(value)
        return found


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
