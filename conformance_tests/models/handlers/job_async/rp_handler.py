"""Returns its input after `seconds`, four jobs at a time."""

import asyncio
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> Any:
    await asyncio.sleep(job["input"].get("seconds", 0))
    return job["input"]


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda current: 4})
