"""A stand-in for the `runpod` package, for handler files on a machine without it: what a worker needs, and no client.

What is missing can be imported, and says so when it is used.
"""

from . import serverless
from .missing import missing
from .serverless.modules.rp_logger import RunPodLogger
from .version import __version__

api_key = None
endpoint_url_base = "https://api.runpod.ai/v2"

Endpoint = missing("runpod.Endpoint")
AsyncioEndpoint = missing("runpod.AsyncioEndpoint")
AsyncioJob = missing("runpod.AsyncioJob")
create_pod = missing("runpod.create_pod")
get_pod = missing("runpod.get_pod")
get_pods = missing("runpod.get_pods")
stop_pod = missing("runpod.stop_pod")
terminate_pod = missing("runpod.terminate_pod")

__all__ = [
    "AsyncioEndpoint",
    "AsyncioJob",
    "Endpoint",
    "RunPodLogger",
    "__version__",
    "api_key",
    "create_pod",
    "endpoint_url_base",
    "get_pod",
    "get_pods",
    "serverless",
    "stop_pod",
    "terminate_pod",
]
