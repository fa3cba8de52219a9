"""Yields 0, 1, ... below `count`, `seconds` apart; raises instead of yielding `fail_at`."""

import time
from collections.abc import Iterator
from typing import Any

import runpod


def handler(job: dict[str, Any]) -> Iterator[Any]:
    given = job["input"]
    for number in range(given["count"]):
        if number == given.get("fail_at"):
            raise ValueError(f"cannot count to {number}")
        time.sleep(given.get("seconds", 0))
        yield number


runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
