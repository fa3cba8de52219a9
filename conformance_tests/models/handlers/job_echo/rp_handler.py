"""Returns its input; with {"show": "job"}, the whole job."""

from typing import Any

import runpod


def handler(job: dict[str, Any]) -> Any:
    given = job["input"]
    return dict(job) if given == {"show": "job"} else given


runpod.serverless.start({"handler": handler})
