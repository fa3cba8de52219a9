"""One HTTP connection to a server, for every command that asks one."""

import http.client
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

import orjson

from penstock.client.access import Headers
from penstock.client.transport import refusal
from penstock.errors import Kind, ServingError


class Connection:
    """To the server at `url`: http or https, with or without a path before /v2. Opened again when it was lost.

    Raises ServingError(INVALID) for a URL that is none.
    """

    def __init__(self, url: str, headers: Headers = ()) -> None:
        self._url = url if "://" in url else f"http://{url}"
        self._headers = dict(headers)
        parts = urlsplit(self._url)
        schemes = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        try:
            self._connection = schemes[parts.scheme](parts.hostname or "", parts.port)
        except (KeyError, ValueError):
            raise ServingError(Kind.INVALID, f"--url expects http://HOST:PORT, got '{url}'") from None
        self._prefix = parts.path.rstrip("/")

    def ask(
        self, verb: str, path: str, headers: Mapping[str, str], body: Sequence[bytes | memoryview] = ()
    ) -> tuple[http.client.HTTPMessage, bytes]:
        """Headers and body of an answer of status 200.

        Raises ServingError: UNAVAILABLE where nobody answers or the status is 503, what `refusal` makes of any other.
        """
        sent = {**self._headers, **headers}
        if body:
            sent["Content-Length"] = str(sum(map(len, body)))
        try:
            self._connection.request(verb, self._prefix + path, body or None, sent)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServingError(Kind.UNAVAILABLE, f"cannot ask {self._url}: {error or type(error).__name__}") from error
        if response.status != HTTPStatus.OK:
            raise refusal(f"HTTP {response.status} {response.reason}", response.status, _reason(answer))
        return response.headers, answer

    def close(self) -> None:
        self._connection.close()


def _reason(answer: bytes) -> str:
    """The text of a refusal: the protocol's `error`, TensorOne's `message`, or the body as it is where another program
    has answered.
    """
    try:
        document = orjson.loads(answer)
        return str(document.get("message") or document["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer[:500].decode(errors="replace").strip() or "no reason was given"
