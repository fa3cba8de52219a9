"""Helpers of handler files. Those that transfer files are missing."""

from ...missing import missing  # noqa: TID252 - it is called runpod only where it is imported
from .rp_download import download_files_from_urls
from .rp_upload import upload_file_to_bucket, upload_in_memory_object

VolumeCache = missing("runpod.serverless.VolumeCache")

__all__ = ["VolumeCache", "download_files_from_urls", "upload_file_to_bucket", "upload_in_memory_object"]
