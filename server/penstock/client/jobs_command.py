"""`penstock jobs`: the jobs of a server, handed in, listed, watched and ended from a command line."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from penstock.client import access

if TYPE_CHECKING:
    from penstock.client.jobs import Jobs

URL = "http://127.0.0.1:8000"
DONE, FAILED, INTERRUPTED = 0, 1, 130
SHORT = 60  # characters of a result in a list

SUBMIT = """\
Hand in a job and print its id. Its input is

  '{"text": "hello"}'  [1,2]     JSON
  @input.json  @-                JSON from a file, from standard input
  text=hello  x=[[1,2],[3,4]]    members of an object: JSON, or a string where it is none
  text=@letter.txt  x=@x.json    the text of a file; of a .json file, its value

For a handler it is what the handler finds in job["input"]; for any other model, its inputs by name.
"""
WATCH = """\
Show what a job does until it has ended: its state and progress, and its results as they come, one JSON value on a line.
What a job has streamed is not repeated as its output. States and progress go to standard error.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `run` reads."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    submit = _action(actions, "submit", _submit, "hand in a job", SUBMIT)
    submit.add_argument("model", metavar="MODEL", help="the model's name")
    submit.add_argument("values", nargs="+", metavar="INPUT", help="JSON, @FILE, or NAME=VALUE for each input")
    submit.add_argument("--wait", action="store_true", help="watch the job until it has ended")
    submit.add_argument("--webhook", metavar="URL", help="where the server posts how the job ended")
    submit.add_argument("--ttl", type=_time, metavar="S", help="seconds it may wait and run in all")
    submit.add_argument("--execution-timeout", type=_time, metavar="S", help="seconds it may run")
    submit.add_argument("--low-priority", action="store_true", help="run it when no other job of the model waits")
    submit.set_defaults(operands="values")
    listing = _action(actions, "list", _list, "show the jobs of a model, newest first")
    listing.add_argument("model", metavar="MODEL", help="the model's name")
    listing.add_argument("--status", type=str.upper, default="", help="only jobs in this state", metavar="STATE")
    listing.add_argument("--limit", type=int, default=50, help="so many at most (default: 50)", metavar="N")
    listing.add_argument("--offset", type=int, default=0, help="leave out so many of the newest", metavar="N")
    for name, act, help, description in (
        ("show", _show, "show how a job stands, or how it ended", ""),
        ("watch", _watch, "show what a job does until it has ended", WATCH),
        ("cancel", _cancel, "end a job that waits or runs", ""),
        ("retry", _retry, "run a job again that failed or took too long", ""),
    ):
        action = _action(actions, name, act, help, description)
        action.add_argument("id", metavar="ID", help="as `submit` printed it")
    purge = _action(actions, "purge", _purge, "end all jobs of a model that wait")
    purge.add_argument("model", metavar="MODEL", help="the model's name")


def _action(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    act: "Callable[[Jobs, argparse.Namespace], int]",
    help: str,
    description: str = "",
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name, allow_abbrev=False, help=help, description=description or f"{help.capitalize()}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(action=act)
    parser.add_argument("--url", default=URL, help="the server (default: %(default)s)", metavar="URL")
    parser.add_argument("--json", action="store_true", help="print what the server answers, one JSON object on a line")
    access.add_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do it; 0 if that went well, and where a job is watched, if it was completed. Raises ServingError."""
    from penstock.client.connection import Connection
    from penstock.client.jobs import Jobs

    with closing(Jobs(Connection(arguments.url, access.headers(arguments)))) as jobs:
        status: int = arguments.action(jobs, arguments)
    return status


def _submit(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    from penstock.client import job_input

    document: dict[str, Any] = {"input": job_input.read(arguments.values, sys.stdin.read)}
    times = {"ttl": arguments.ttl, "executionTimeout": arguments.execution_timeout}
    policy: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
    if arguments.low_priority:
        policy["lowPriority"] = True
    if policy:
        document["policy"] = policy
    if arguments.webhook is not None:
        document["webhook"] = arguments.webhook
    answer = jobs.submit(arguments.model, document)
    if arguments.wait:
        if not arguments.json:
            print(answer["id"], file=sys.stderr, flush=True)
        return _follow(jobs, arguments, arguments.model, answer["id"])
    return _print(arguments, answer, answer["id"])


def _list(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    from penstock.client.job_display import dumped, error_of, seconds

    page = jobs.list(arguments.model, arguments.status, arguments.offset, arguments.limit)
    rows = [("ID", "STATUS", "WAITED", "RAN", "RESULT")]
    for job in page["requests"]:
        result = (
            error_of(job).rpartition("\n")[2] if "error" in job else dumped(job["output"]) if "output" in job else ""
        )
        shown = result if len(result) <= SHORT else f"{result[: SHORT - 3]}..."
        rows.append((job["id"], job["status"], seconds(job.get("delayTime")), seconds(job.get("executionTime")), shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if page["hasMore"]:
        shown_to = arguments.offset + len(page["requests"])
        lines.append(f"{shown_to} of {page['total']}; --offset {shown_to} shows what follows")
    return _print(arguments, page, "\n".join(lines))


def _show(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    from penstock.client.job_display import error_of, seconds, text

    found = jobs.find(arguments.id)
    job = jobs.status(found["endpointId"], arguments.id)
    rows = {
        "id": job["id"],
        "model": found["endpointId"],
        "status": job["status"],
        "created": found["createdAt"],
        "waited": seconds(job.get("delayTime")),
        "ran": seconds(job.get("executionTime")),
        "worker": job.get("workerId", ""),
        "retries": str(job.get("retries", "")),
        "progress" if job["status"] == "IN_PROGRESS" else "output": text(job["output"]) if "output" in job else "",
        "error": error_of(job),
    }
    return _print(arguments, job, "\n".join(f"{name:9} {value}" for name, value in rows.items() if value))


def _watch(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    return _follow(jobs, arguments, _model(jobs, arguments), arguments.id)


def _cancel(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    answer = jobs.cancel(_model(jobs, arguments), arguments.id)
    _print(arguments, answer, answer["status"])
    return DONE if answer["status"] == "CANCELLED" else FAILED


def _retry(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    answer = jobs.retry(_model(jobs, arguments), arguments.id)
    return _print(arguments, answer, answer["status"])


def _purge(jobs: "Jobs", arguments: argparse.Namespace) -> int:
    answer = jobs.purge(arguments.model)
    return _print(arguments, answer, f"Removed {answer['removed']} jobs of '{arguments.model}' that waited.")


def _model(jobs: "Jobs", arguments: argparse.Namespace) -> str:
    return str(jobs.find(arguments.id)["endpointId"])


def _follow(jobs: "Jobs", arguments: argparse.Namespace, model: str, id: str) -> int:
    from penstock.client.job_display import Display, JsonLines, Lines, Live

    display: Display
    if arguments.json:
        display = JsonLines(sys.stdout)
    else:
        display = (Live if sys.stderr.isatty() else Lines)(sys.stdout, sys.stderr)
    state = ""
    try:
        for look in jobs.follow(model, id):
            display.show(look)
            state = look.job.get("status", "")
    except KeyboardInterrupt:
        print(
            f"\nThe job goes on. See it: penstock jobs watch {id}; end it: penstock jobs cancel {id}", file=sys.stderr
        )
        return INTERRUPTED
    return DONE if state == "COMPLETED" else FAILED


def _print(arguments: argparse.Namespace, answer: dict[str, Any], text: str) -> int:
    from penstock.client.job_display import dumped

    print(dumped(answer) if arguments.json else text)
    return DONE


def _time(text: str) -> int:
    """Milliseconds of seconds."""
    try:
        milliseconds = round(float(text) * 1000)
    except (ValueError, OverflowError):
        milliseconds = 0
    if milliseconds <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got '{text}'")
    return milliseconds
