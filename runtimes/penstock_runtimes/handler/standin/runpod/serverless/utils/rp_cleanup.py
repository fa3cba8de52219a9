"""Removes what a job has left in the working directory."""

from __future__ import annotations

import os
import shutil


def clean(folder_list: list[str] | None = None) -> None:
    """Remove `input_objects`, `output_objects`, `job_files` and `output.zip`, and the folders that are named."""
    for folder in ("input_objects", "output_objects", "job_files", *(folder_list or ())):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists("output.zip"):
        os.remove("output.zip")
