"""Downloads, which the stand-in does not do."""

from ...missing import missing  # noqa: TID252 - it is called runpod only where it is imported

download_files_from_urls = missing("runpod.serverless.utils.rp_download.download_files_from_urls")
file = missing("runpod.serverless.utils.rp_download.file")
