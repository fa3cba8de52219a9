"""Reports "step 1/2", takes `seconds`, reports once more and returns at once."""

import asyncio
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> Any:
    runpod.serverless.progress_update(job, "step 1/2")
    await asyncio.sleep(job["input"]["seconds"])
    runpod.serverless.progress_update(job, "step 2/2")
    return "done"


runpod.serverless.start({"handler": handler})
