"""Whether there is a GPU."""

import shutil
import subprocess


def is_available() -> bool:
    """Whether NVIDIA's tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")
