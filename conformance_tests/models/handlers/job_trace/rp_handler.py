"""Says of each run which it was, so that two runs of one job can be told apart.

A job is {"name", "trace", "seconds", "chunks"}. A line with its name, the run and this process goes to the file `trace`
when a run begins. Every run yields {"name", "run", "index"}, `chunks` times; the list of these is its result.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import runpod


def handler(job: dict[str, Any]) -> Iterator[Any]:
    given, run = job["input"], os.urandom(8).hex()
    with open(given["trace"], "ab", buffering=0) as trace:
        trace.write(f"{given['name']} {run} {os.getpid()}\n".encode())
    for index in range(given["chunks"]):
        time.sleep(given["seconds"])
        yield {"name": given["name"], "run": run, "index": index}


runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
