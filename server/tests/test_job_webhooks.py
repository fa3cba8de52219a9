"""The outbox over real sockets: what is posted, when again, and where to never. Protocol page jobs, section 1.7."""

import asyncio
import contextlib
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from msgspec.structs import replace
from penstock.errors import Kind, ServingError
from penstock.job_api.journal import Journal
from penstock.job_api.store import Delivery, Job, Request, State
from penstock.job_api.webhooks import SIGNATURE, Outbox, check_url, is_public

from .fakes import LIMIT_S, EchoInstance
from .fakes_job_door import House, Say, X, handler, house, never, run, settled
from .fakes_jobs import MemoryJobStore


@dataclass(slots=True)
class Post:
    """What a receiver was sent."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class Receiver:
    """A server that keeps what it is posted, and answers what it is told to, in turn; then 200."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    posts: "asyncio.Queue[Post]" = field(default_factory=asyncio.Queue)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.posts.put_nowait(Post(head[0], headers, body))
            answer = self.answers.pop(0) if self.answers else b"HTTP/1.1 200 OK\r\n\r\n"
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the outbox hangs up as soon as it has the status
        finally:
            writer.close()

    async def post(self) -> Post:
        return await asyncio.wait_for(self.posts.get(), LIMIT_S)


@contextlib.asynccontextmanager
async def receiver(*answers: Answer) -> AsyncIterator[Receiver]:
    made = Receiver(answers=list(answers))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?a=b c".replace(" ", "%20")
    async with server:
        yield made


class Sent(MemoryJobStore):
    """Has a set of webhooks, and keeps how their attempts went."""

    def __init__(self, *due: Delivery) -> None:
        super().__init__()
        self.due = list(due)
        self.sent: asyncio.Queue[tuple[str, int, bool, str]] = asyncio.Queue()
        self.asked = 0

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> list[Delivery]:
        self.asked += 1
        taken, self.due = self.due[:limit], self.due[limit:]
        return taken

    async def webhook_sent(self, id: str, attempt: int, delivered: bool, now_ms: int, note: str = "") -> None:
        self.sent.put_nowait((id, attempt, delivered, note))


def delivery(url: str, attempt: int = 1, id: str = "j") -> Delivery:
    request = Request(id, "m", b'{"x":1}', 1, 2, 3, 4, webhook=url, webhook_form="plain")
    return Delivery(Job(request, State.COMPLETED), attempt)


def render(job: Job) -> bytes:
    return b'{"id":"%s"}' % job.request.id.encode()


async def attempted(
    *due: Delivery, allow_private: bool = True, secret: str = "", context: ssl.SSLContext | None = None
) -> list[tuple[str, int, bool, str]]:
    """How the attempts at these went."""
    store = Sent(*due)
    outbox = Outbox(store, {"plain": render}, Journal(), allow_private, secret, context)
    running = asyncio.create_task(outbox.run())
    try:
        return [await asyncio.wait_for(store.sent.get(), LIMIT_S) for _ in due]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


# -- what is posted


def test_a_webhook_is_a_post_of_json_that_names_the_job_and_the_attempt() -> None:
    async def test() -> None:
        async with receiver() as to:
            assert await attempted(delivery(to.url, attempt=2)) == [("j", 2, True, "status 200")]
            post = await to.post()
            assert post.line == "POST /hook?a=b%20c HTTP/1.1"
            assert post.body == b'{"id":"j"}'
            assert post.headers.pop("user-agent").startswith("Penstock/")
            assert post.headers == {
                "host": to.url.split("/")[2],
                "content-type": "application/json",
                "content-length": "10",
                "connection": "close",
                "x-job-id": "j",
                "x-attempt": "2",
            }

    asyncio.run(test())


def test_a_secret_signs_the_body() -> None:
    async def test() -> None:
        async with receiver() as to:
            await attempted(delivery(to.url), secret="key")
            post = await to.post()
            expected = hmac.new(b"key", post.body, hashlib.sha256).hexdigest()
            assert post.headers[SIGNATURE.lower()] == f"sha256={expected}"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("answer", "delivered", "note"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True, "status 200"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True, "status 204"),
        (b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\nHTTP/1.1 201 Created\r\n\r\n", True, "status 201"),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\n\r\n", False, "status 302"),
        (b"HTTP/1.1 500 No\r\n\r\n", False, "status 500"),
        (b"SSH-2.0\r\n", False, "the receiver did not answer in HTTP"),
        (b"", False, "the receiver closed the connection"),
    ],
)
def test_only_a_status_of_200_to_299_delivers(answer: bytes, delivered: bool, note: str) -> None:
    async def test() -> None:
        async with receiver(answer) as to:
            assert await attempted(delivery(to.url)) == [("j", 1, delivered, note)]
            await to.post()
            assert to.posts.empty()  # no redirect was followed

    asyncio.run(test())


def test_a_receiver_that_is_not_there_is_an_attempt_that_failed() -> None:
    async def test() -> None:
        [(_, _, delivered, note)] = await attempted(delivery("http://127.0.0.1:1/"))
        assert not delivered
        assert "127.0.0.1" in note

    asyncio.run(test())


def test_a_slow_receiver_delays_no_other() -> None:
    stuck = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter) -> None:
        await stuck.wait()

    async def test() -> None:
        async with receiver(wait) as slow, receiver() as quick:
            store = Sent(delivery(slow.url, id="slow"), delivery(quick.url, id="quick"))
            outbox = Outbox(store, {"plain": render}, Journal(), True)
            running = asyncio.create_task(outbox.run())
            assert await asyncio.wait_for(store.sent.get(), LIMIT_S) == ("quick", 1, True, "status 200")
            assert store.sent.empty()
            stuck.set()
            assert (await asyncio.wait_for(store.sent.get(), LIMIT_S))[0] == "slow"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(test())


def test_a_poke_has_the_outbox_look_again() -> None:
    async def test() -> None:
        async with receiver() as to:
            store = Sent()
            outbox = Outbox(store, {"plain": render}, Journal(), True)
            running = asyncio.create_task(outbox.run())
            await settled()
            assert store.asked == 1
            store.due.append(delivery(to.url))
            outbox.poke()
            assert (await asyncio.wait_for(store.sent.get(), LIMIT_S))[2]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(test())


# -- where to


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
    ],
)
def test_only_public_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (1, "expected an absolute http or https URL"),
        ("", "expected an absolute http or https URL"),
        ("example.com/x", "expected an absolute http or https URL"),
        ("ftp://example.com/", "expected an absolute http or https URL"),
        ("http:///x", "expected an absolute http or https URL"),
        ("http://example.com:0/", "port 0 cannot be posted to"),
        ("http://example.com:99999/", "Port out of range 0-65535"),
        ("http://example.com/a b", "a URL has no blanks and no control characters"),
        ("http://user:word@example.com/", "user names and passwords in the URL are not sent"),
        ("http://127.0.0.1/", "127.0.0.1 is a private or loopback address; --webhook-allow-private allows it"),
        ("http://[::1]/", "::1 is a private or loopback address; --webhook-allow-private allows it"),
        ("https://localhost/", "localhost is a private or loopback address; --webhook-allow-private allows it"),
    ],
)
def test_urls_that_cannot_be_posted_to_are_refused_at_once(url: object, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_url(url, allow_private=False)
    assert str(caught.value) == reason


def test_a_line_end_in_a_url_can_smuggle_no_header() -> None:
    assert check_url("http://example.com/ü?q=ü", False)
    with pytest.raises(ValueError):
        check_url("http://example.com/\r\nX: y", False)


def test_a_name_that_resolves_to_a_private_address_is_not_posted_to() -> None:
    """The name passes at submission; what it resolves to is looked at before the connection is made."""

    async def test() -> None:
        async with receiver() as to:
            port = to.url.split(":")[2].split("/")[0]
            [(_, _, delivered, note)] = await attempted(
                delivery(f"http://localhost.localdomain:{port}/"), allow_private=False
            )
            assert not delivered
            assert to.posts.empty()
            assert note

    asyncio.run(test())


def test_an_address_that_was_allowed_once_is_checked_again_when_it_is_posted_to() -> None:
    async def test() -> None:
        async with receiver() as to:
            [(_, _, delivered, note)] = await attempted(delivery(to.url), allow_private=False)
            assert (delivered, note) == (
                False,
                "127.0.0.1 is a private or loopback address; --webhook-allow-private allows it",
            )
            assert to.posts.empty()

    asyncio.run(test())


def test_a_private_address_is_refused_with_the_job(tmp_path: Path) -> None:
    async def test() -> None:
        async with house(tmp_path, webhook_allow_private=False) as made:
            got = await made.call("POST", "/v2/m/run", X | {"webhook": "http://10.0.0.1/"})
            assert (got.status, got.json["details"]["field"]) == (400, "webhook")

    asyncio.run(test())


# -- TLS


@contextlib.asynccontextmanager
async def secure_receiver(folder: Path) -> AsyncIterator[Receiver]:
    (folder / "pair.pem").write_text(PAIR)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pair.pem")
    made = Receiver()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    async with server:
        yield made


def test_a_certificate_that_nobody_vouches_for_is_not_posted_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with secure_receiver(tmp_path) as to:
            [(_, _, delivered, note)] = await attempted(delivery(to.url))
            assert not delivered
            assert "certificate verify failed" in note
            assert to.posts.empty()

    asyncio.run(test())


def test_a_certificate_is_checked_against_the_name_and_not_the_address(tmp_path: Path) -> None:
    async def test() -> None:
        async with secure_receiver(tmp_path) as to:
            context = ssl.create_default_context(cafile=str(tmp_path / "pair.pem"))
            assert await attempted(delivery(to.url), context=context) == [("j", 1, True, "status 200")]
            by_address = to.url.replace("localhost", "127.0.0.1")
            [(_, _, delivered, note)] = await attempted(delivery(by_address), context=context)
            assert (delivered, "IP address mismatch" in note) == (False, True)

    asyncio.run(test())


# A key and a certificate for localhost, good until 2126 and for nothing else.
PAIR = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjXcMVk7fiicsFmA0
SuHATdjxuL6G3gBXr3oLbBTXnSWhRANCAAQQlVRSSFRPKoiaIHB2CjoM4EfqCYSC
TV6tVMHrhuW6+FzB4twPY+CnMTJbmWOkRbYfCfPdmPdB7k9EqHpX9yVL
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUTxw0GmXj0C/jLsh74Ko324ecKqswCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTE0NTg0MVoYDzIxMjYxMDI4
MTQ1ODQxWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQQlVRSSFRPKoiaIHB2CjoM4EfqCYSCTV6tVMHrhuW6+FzB4twPY+Cn
MTJbmWOkRbYfCfPdmPdB7k9EqHpX9yVLo2kwZzAdBgNVHQ4EFgQU6bPRDWL0FZRP
NWvVkDTFMZvcclkwHwYDVR0jBBgwFoAU6bPRDWL0FZRPNWvVkDTFMZvcclkwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
RwAwRAIgcDufphVPyHNZlfKoR+rfStTKj3zYGzV1ZhQG+eO3iKgCIBrNK8YF2uhB
z/5XH8NarAyU7TJhV9zEWz5vjhSGhXfY
-----END CERTIFICATE-----
"""


# -- from the job to the receiver


def test_every_end_of_a_job_is_told(tmp_path: Path) -> None:
    def script(value: Any, say: Say) -> None:
        if value == "fail":
            say.fail(ServingError(Kind.INTERNAL, "as told"))
        elif value == "run":
            never(value, say)
        else:
            say({"sum": 3})

    async def test(made: House) -> None:
        async with receiver() as to:
            request = {"webhook": to.url, "s3Config": {"accessSecret": "hidden"}}
            done = await made.post("/v2/h/runsync", request | {"input": {"a": 1}})
            post = await to.post()
            assert post.json == done | {"input": {"a": 1}, "webhook": to.url}
            assert b"hidden" not in post.body
            await made.post("/v2/h/runsync", request | {"input": "fail"})
            assert ((failed := (await to.post()).json)["status"], failed["error"]) == ("FAILED", "as told")
            running = (await made.post("/v2/h/run", request | {"input": "run"}))["id"]
            waiting = (await made.post("/v2/h/run", request | {"input": "run"}))["id"]
            await made.post(f"/v2/h/cancel/{running}")
            assert (await to.post()).json["status"] == "CANCELLED"
            await made.until(f"/v2/h/status/{waiting}", lambda job: job["status"] == "IN_PROGRESS")
            queued = (await made.post("/v2/h/run", request | {"input": "run"}))["id"]
            await made.post("/v2/h/purge-queue")
            assert (await to.post()).json["id"] == queued
            await made.post(f"/v2/h/cancel/{waiting}")
            assert (await to.post()).json["id"] == waiting

    run(tmp_path, test, {"h": handler(script)})


def test_an_expired_job_is_told_of_once_as_timed_out(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        async with receiver() as to:
            id = (await made.post("/v2/h/run", {"input": 1, "webhook": to.url}))["id"]
            told = (await to.post()).json
            assert (told["id"], told["status"], told["error"]) == (id, "TIMED_OUT", "ttl of 1000 ms expired")
            assert (await made.call("GET", f"/v2/h/status/{id}")).status == 404

    run(tmp_path, test, {"h": handler(never)}, job_ttl_secs=1)


def test_a_callback_speaks_the_dialect_that_asked_for_it(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        async with receiver() as to:
            request = X | {"callbackUrl": to.url, "tags": {"a": "b"}}
            got = await made.call("POST", "/v2/endpoints/m/runasync", request)
            told = (await to.post()).json
            assert (told["jobId"], told["status"], told["result"]) == (
                got.json["jobId"],
                "completed",
                {"Y": [1.0, 2.0]},
            )
            assert told["tags"] == {"a": "b"}

    run(tmp_path, test)


class Impatient(MemoryJobStore):
    """Attempts are due again at once."""

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> Any:
        return await super().due_webhooks(now_ms + 10_000, limit, lease_ms)

    async def next_ms(self) -> int:
        return 0


def test_an_attempt_is_repeated_with_the_same_bytes_until_three_are_spent(tmp_path: Path) -> None:
    store = Impatient()

    async def test(made: House) -> None:
        async with receiver(*[b"HTTP/1.1 500 No\r\n\r\n"] * 3) as to:
            await made.post("/v2/m/runsync", X | {"webhook": to.url})
            posts = [await to.post() for _ in range(3)]
            assert [post.headers["x-attempt"] for post in posts] == ["1", "2", "3"]
            assert len({post.body for post in posts}) == 1
            async with asyncio.timeout(LIMIT_S):
                while any(entry.webhook for entry in store.entries.values()):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.001)
            assert to.posts.empty()
            metrics = (await made.service.metrics()).decode()
            assert 'penstock_jobs_webhook_attempts_total{model="m",result="failed"} 2\n' in metrics
            assert 'penstock_jobs_webhook_attempts_total{model="m",result="given_up"} 1\n' in metrics

    run(tmp_path, test, {"m": EchoInstance}, store=store)


def test_a_webhook_that_was_due_is_sent_after_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        store = MemoryJobStore()
        async with receiver() as to:
            await store.add(Request("j", "m", b"1", 1, 2**52, 1, 2**52, webhook=to.url))
            await store.claim({"m": 1}, "w", 2, 1000)
            await store.finish("j", 1, State.COMPLETED, 3, b"5")
            async with house(tmp_path, store=store):
                assert (await to.post()).json["output"] == 5

    asyncio.run(test())


def test_a_job_renders_the_same_each_time() -> None:
    job = delivery("http://example.com/").job
    assert render(job) == render(replace(job, webhook_note="failed"))
