"""The job API as its clients see it, and a receiver of webhooks."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, TypeAlias
from urllib.parse import urlencode

from conformance_tests.http_wire import Answer, Connection, HttpClient, encode

LIMIT_S = 60.0  # no wait takes this long, but a lost job must not hang a test
LOOK_S = 0.02  # between two looks at what cannot be waited for
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

Document: TypeAlias = dict[str, Any]


def until(found: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """What `found` gives once that is true. Raises AssertionError naming `what` when the time is over."""
    deadline_s = time.monotonic() + limit_s
    pause = threading.Event()
    while not (value := found()):
        assert time.monotonic() < deadline_s, f"{what}: not within {limit_s:.0f} s"
        pause.wait(LOOK_S)
    return value


class Endpoint:
    """One endpoint in RunPod's dialect. Every answer is checked for what all have in common."""

    def __init__(self, url: str, name: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url
        self.name = name
        self._http = HttpClient(url)
        self._headers = dict(headers or {})

    def ask(self, verb: str, path: str, document: object = None, **query: object) -> Answer:
        """One exchange; its body is JSON whatever the status. No document is an empty body."""
        target = f"/v2/{self.name}/{path}" + (f"?{urlencode(query)}" if query else "")
        body = b"" if document is None else encode(document)
        answer = self._http.request(verb, target, None if verb == "GET" else body, self._headers)
        assert answer.headers["content-type"] == "application/json", answer
        return answer

    def told(self, verb: str, path: str, document: object = None, **query: object) -> Document:
        """The document of an answer, which must be exactly 200."""
        answer = self.ask(verb, path, document, **query)
        assert answer.status == 200, answer
        found = answer.json()
        assert isinstance(found, dict), found
        return found

    def post_text(self, path: str, text: str, content_type: str) -> Answer:
        """A body as it is written here."""
        headers = {"Content-Type": content_type, **self._headers}
        return self._http.request("POST", f"/v2/{self.name}/{path}", text.encode(), headers)

    def refused(self, status: int, verb: str, path: str, document: object = None, /, **query: object) -> Document:
        """The document of an error with this status: never one that looks like a job."""
        answer = self.ask(verb, path, document, **query)
        assert answer.status == status, answer
        found = answer.json()
        assert isinstance(found["error"], str)
        assert {*found} <= {"error", "code", "details"}, found
        return dict(found)

    @contextlib.contextmanager
    def begun(self, verb: str, path: str) -> Iterator[Connection]:
        """A request whose answer is for the caller to receive; the server has it once a later one was answered."""
        with self._http.connect() as connection:
            connection.send(connection.head(verb, f"/v2/{self.name}/{path}", self._headers))
            yield connection

    def run(self, given: object, **fields: object) -> str:
        """The id of a job that was accepted."""
        accepted = self.told("POST", "run", {"input": given, **fields})
        assert accepted == {"id": accepted["id"], "status": "IN_QUEUE"}
        return str(accepted["id"])

    def runsync(self, given: object, wait_ms: int | None = None, **fields: object) -> Document:
        query = {} if wait_ms is None else {"wait": wait_ms}
        return checked(self.told("POST", "runsync", {"input": given, **fields}, **query))

    def status(self, id: str) -> Document:
        return checked(self.told("GET", f"status/{id}"))

    def ended(self, id: str) -> Document:
        """The job once it is final."""
        deadline_s = time.monotonic() + LIMIT_S
        while (job := checked(self.told("GET", f"status-sync/{id}", wait=20_000)))["status"] not in FINAL:
            assert time.monotonic() < deadline_s, f"{job} does not end"
        return job

    def running(self, id: str) -> Document:
        """The job once it has been picked up."""
        return dict(until(lambda: (job := self.status(id))["status"] != "IN_QUEUE" and job, f"job {id} is picked up"))

    def cancel(self, id: str) -> Document:
        return checked(self.told("POST", f"cancel/{id}"))

    def health(self) -> Document:
        return self.told("GET", "health")


def checked(job: Document) -> Document:
    """A job's answer, after comparing its fields with those that its state allows."""
    state = job["status"]
    started = "workerId" in job
    allowed = {"id", "status"}
    if state != "IN_QUEUE" and (started or state in ("IN_PROGRESS", "COMPLETED")):
        allowed |= {"delayTime", "workerId", "retries"}
        assert {"delayTime", "workerId"} <= {*job}, job
    if state in FINAL and started:
        assert "executionTime" in job, job
    allowed |= {"executionTime"} if state in FINAL and (started or state == "TIMED_OUT") else set()
    allowed |= {"output"} if state in ("IN_PROGRESS", "COMPLETED", "FAILED") else set()
    if state in ("FAILED", "TIMED_OUT"):
        allowed |= {"error"}
        assert isinstance(job["error"], str), job
        assert job["error"], job
    assert {*job} <= allowed, job
    numbers = [job[name] for name in ("delayTime", "executionTime", "retries") if name in job]
    assert all(type(number) is int and number >= 0 for number in numbers), job
    assert job.get("retries") != 0, job
    return job


@dataclass(frozen=True, slots=True)
class Post:
    """What a receiver got."""

    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    at_s: float  # monotonic

    def json(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """Receives webhooks on a free port of this machine, in threads of its own, until the end of its block."""

    def __init__(self, answer: Callable[[Post], int] = lambda post: 200) -> None:
        """`answer` gives the status for each; it is called by the thread that received it."""
        self._posts: list[Post] = []
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers["content-length"]))
                if len(body) != int(headers["content-length"]):
                    return  # the sender was killed in the middle
                post = Post(self.path, headers, body, time.monotonic())
                status = answer(post)
                receiver._keep(post)
                self.send_response(status)
                self.send_header("Location", f"{receiver.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing is said of a request on standard error: tests look at `posts`."""

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def posts(self, path: str = "") -> list[Post]:
        """Those that came so far, to `path` or to any."""
        with self._changed:
            return [post for post in self._posts if path in ("", post.path)]

    def wait(self, path: str, number: int = 1, limit_s: float = LIMIT_S) -> list[Post]:
        """The posts to `path`, once there are `number`."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.posts(path)) >= number, limit_s)
            assert came, f"{number} posts to {path}: not within {limit_s:.0f} s"
            return self.posts(path)

    def _keep(self, post: Post) -> None:
        with self._changed:
            self._posts.append(post)
            self._changed.notify_all()


class _QuietServer(ThreadingHTTPServer):
    """A sender that is killed in the middle of a request is nothing to tell about."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)
