"""Fails in the way that its input names."""

import os
from typing import Any

import runpod


def handler(job: dict[str, Any]) -> Any:
    match job["input"].get("how"):
        case "raise":
            raise ValueError("no water")
        case "return":
            return {"error": "no pressure", "seen": True}
        case "die":
            os._exit(3)
        case "large":
            return "w" * job["input"]["bytes"]
    return {"error": None, "well": True}


runpod.serverless.start({"handler": handler})
