"""The outbox: webhooks that are due in the store are posted until they are delivered or their attempts are spent.

An address is chosen by the caller of the API, so it is resolved here, checked, and connected to as it was checked: a
name that resolves to something else a moment later changes nothing. Only the status line of the answer is read, which
is all that counts, and no redirect is followed. That takes so little of HTTP that a client library would save nothing.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, quote, urlsplit

import penstock
from penstock.access import as_header
from penstock.errors import Kind, ServingError
from penstock.job_api.journal import Journal
from penstock.job_api.metrics import DELIVERED, FAILED, GIVEN_UP
from penstock.job_api.store import WEBHOOK_ATTEMPTS, WEBHOOK_INTERVAL_MS, Delivery, Job, JobStore

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # of one attempt, from the look-up of the name to the status
LEASE_MS = 30_000  # longer than an attempt: one that was taken and never reported was lost with its process
AT_ONCE = 64  # attempts under way: a slow receiver delays no other
LOOK_S = 5.0  # another process may have made one due
PAUSE_S = 1.0  # after the store failed
SIGNATURE = "X-Penstock-Signature"

Render = Callable[[Job], bytes]


def check_url(url: object, allow_private: bool) -> str:
    """An absolute http or https URL that may be posted to, as far as that can be told without looking its name up.

    Raises ValueError saying what is wrong.
    """
    if not isinstance(url, str):
        raise ValueError("expected an absolute http or https URL")
    parts = urlsplit(url)  # raises for brackets that hold no address
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an absolute http or https URL")
    if parts.port == 0:  # reading it raises for what is no port
        raise ValueError("port 0 cannot be posted to")
    if not url.isprintable() or " " in url:
        raise ValueError("a URL has no blanks and no control characters")
    if parts.username is not None or parts.password is not None:
        raise ValueError("user names and passwords in the URL are not sent")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        private = parts.hostname == "localhost"
    else:
        private = not is_public(str(address))
    if private and not allow_private:
        raise ValueError(f"{parts.hostname} is a private or loopback address; --webhook-allow-private allows it")
    return url


def is_public(address: str) -> bool:
    """Whether an IP address, and any that is wrapped in it, is one of the public Internet."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed in NAT64:  # which alone is how a network without IPv4 reaches it
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        inner = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if not all(wrapped is None or is_public(str(wrapped)) for wrapped in inner):
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Outbox:
    """Posts what is due. Runs on one event loop; `poke` says that something may have become due."""

    def __init__(
        self,
        store: JobStore,
        render: Mapping[str, Render],  # by the form that a job's request names
        journal: Journal,
        allow_private: bool = False,
        secret: str = "",
        context: ssl.SSLContext | None = None,
    ) -> None:
        """`secret` signs each body; `context` replaces the system's certificates and verification."""
        self._store = store
        self._render = render
        self._journal = journal
        self._allow_private = allow_private
        self._secret = secret.encode()
        self._context = context
        self._poked = asyncio.Event()
        self._posting: set[asyncio.Task[None]] = set()
        self.attempts: Counter[tuple[str, str]] = Counter()  # by endpoint, and by how they went

    def poke(self) -> None:
        self._poked.set()

    async def run(self) -> None:
        """Until it is cancelled. What is under way then is due again once its lease lapses."""
        try:
            while True:
                try:
                    await self._take()
                except ServingError as error:
                    logger.error("webhooks: the job store failed: %s", error.message)
                    await asyncio.sleep(PAUSE_S)
        finally:
            for task in self._posting:
                task.cancel()
            await asyncio.gather(*self._posting, return_exceptions=True)

    async def _take(self) -> None:
        self._poked.clear()
        room = AT_ONCE - len(self._posting)
        if room:
            for delivery in await self._store.due_webhooks(_now_ms(), room, LEASE_MS):
                task = asyncio.create_task(self._deliver(delivery))
                self._posting.add(task)
                task.add_done_callback(self._posted)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._poked.wait(), LOOK_S)

    def _posted(self, task: "asyncio.Task[None]") -> None:
        self._posting.discard(task)
        if len(self._posting) == AT_ONCE - 1:
            self._poked.set()  # there may be more than there was room for
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("webhooks: an attempt could not be recorded", exc_info=error)

    async def _deliver(self, delivery: Delivery) -> None:
        """Make one attempt and record it."""
        request = delivery.job.request
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await self._post(delivery)
            delivered, note = 200 <= status < 300, f"status {status}"
        except TimeoutError:
            delivered, note = False, f"no answer within {TIMEOUT_S:.0f} s"
        except (OSError, ValueError, ServingError) as error:
            delivered, note = False, str(error) or type(error).__name__
        level = "info" if delivered else "warning"
        which = f"webhook attempt {delivery.attempt} of {WEBHOOK_ATTEMPTS}"
        self._journal.note(request.endpoint, _now_ms(), level, request.id, f"{which}: {note}")
        logger.debug("%s: %s", which, note, extra=request.names)
        given_up = not delivered and delivery.attempt >= WEBHOOK_ATTEMPTS
        self.attempts[request.endpoint, DELIVERED if delivered else GIVEN_UP if given_up else FAILED] += 1
        if given_up:
            logger.warning("the webhook of a job was given up: %s", note, extra=request.names)
        await self._store.webhook_sent(request.id, delivery.attempt, delivered, _now_ms(), note)
        if not delivered:
            asyncio.get_running_loop().call_later(WEBHOOK_INTERVAL_MS / 1000, self.poke)

    async def _post(self, delivery: Delivery) -> int:
        """The status of the answer. Raises OSError, TimeoutError, ServingError, ValueError."""
        request = delivery.job.request
        parts = urlsplit(check_url(request.webhook, self._allow_private))
        body = self._render[request.webhook_form](delivery.job)
        secure = parts.scheme == "https"
        if secure and self._context is None:
            self._context = ssl.create_default_context()
        address = await self._resolve(parts)
        reader, writer = await asyncio.open_connection(
            address,
            _port(parts),
            ssl=self._context if secure else None,
            server_hostname=parts.hostname if secure else None,
        )
        try:
            writer.write(self._head(parts, delivery, body) + body)
            await writer.drain()
            return await _status(reader)
        finally:
            writer.transport.abort()  # nothing more is wanted of this connection, whatever is under way on it

    async def _resolve(self, parts: SplitResult) -> str:
        """The address to connect to: the first of the name's that may be. Raises ServingError(FORBIDDEN)."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if self._allow_private or is_public(address):
                return address
        raise ServingError(
            Kind.FORBIDDEN, f"{parts.hostname} has no public address; --webhook-allow-private allows {addresses[0]}"
        )

    def _head(self, parts: SplitResult, delivery: Delivery, body: bytes) -> bytes:
        host = parts.netloc.encode("idna") if not parts.netloc.isascii() else parts.netloc.encode()
        target = quote(parts.path or "/", safe=SAFE) + (f"?{quote(parts.query, safe=SAFE)}" if parts.query else "")
        lines = [
            f"POST {target} HTTP/1.1".encode(),
            b"Host: " + host,
            b"Content-Type: application/json",
            b"Content-Length: %d" % len(body),
            f"User-Agent: Penstock/{penstock.__version__}".encode(),
            b"Connection: close",
            f"X-Job-Id: {delivery.job.request.id}".encode(),
            b"X-Attempt: %d" % delivery.attempt,
        ]
        if id := as_header(delivery.job.request.request_id):
            lines.append(b"X-Request-Id: " + id)
        if self._secret:
            lines.append(f"{SIGNATURE}: sha256={hmac.new(self._secret, body, hashlib.sha256).hexdigest()}".encode())
        return b"\r\n".join([*lines, b"", b""])


SAFE = "/%:@!$&'()*+,;=~?-._"  # what a URL may hold as it is; its own escapes stay


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of the final answer, which interim ones may precede. Raises ValueError for anything but HTTP/1."""
    while True:
        line = await reader.readline()
        version, _, rest = line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise ValueError("the receiver did not answer in HTTP" if line else "the receiver closed the connection")
        status = int(rest[:3])
        if status >= 200:
            return status
        while (await reader.readline()).strip():
            pass  # the interim answer's headers


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
