"""Jobs over HTTP: queued, durable, in RunPod's and TensorOne's words."""

from penstock.job_api.service import JobService, open_service

__all__ = ["JobService", "open_service"]
