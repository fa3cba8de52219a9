"""Uploads, which the stand-in does not do."""

from ...missing import missing  # noqa: TID252 - it is called runpod only where it is imported

bucket_upload = missing("runpod.serverless.utils.rp_upload.bucket_upload")
files = missing("runpod.serverless.utils.rp_upload.files")
get_boto_client = missing("runpod.serverless.utils.rp_upload.get_boto_client")
upload_file_to_bucket = missing("runpod.serverless.utils.rp_upload.upload_file_to_bucket")
upload_image = missing("runpod.serverless.utils.rp_upload.upload_image")
upload_in_memory_object = missing("runpod.serverless.utils.rp_upload.upload_in_memory_object")
