"""Blocks for `seconds` where nothing can interrupt it but the end of its process, then returns its input."""

import time
from typing import Any

import runpod


def handler(job: dict[str, Any]) -> Any:
    time.sleep(job["input"]["seconds"])
    return job["input"]


runpod.serverless.start({"handler": handler})
