"""Install the built wheel in a clean environment and serve from there: `python -m conformance_tests.wheel dist`."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUEST = {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]}


def main(dist: Path) -> None:
    [wheel] = dist.glob("penstock-*.whl")
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        programs = Path(scratch, "bin")
        subprocess.run(
            [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             "--constraint", ROOT / "constraints.txt", f"{wheel.resolve()}[cpu]"],
            check=True,
        )  # fmt: skip
        # A clean environment in the other sense too: nothing of the source tree is importable.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        server = subprocess.Popen(
            [programs / "penstock", "serve", ROOT / "model_repository" / "times_version", "--http-port=0",
             "--grpc-port=0", "--metrics-port=0", "--announce=json"],
            cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"the installed server ended with status {server.wait()} before it was ready")
            url = json.loads(line)["http"]
            request = urllib.request.Request(
                f"{url}/v2/models/times_version/infer", json.dumps(REQUEST).encode(), method="POST"
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                data = json.load(answer)["outputs"][0]["data"]
        finally:
            server.terminate()
            status = server.wait(timeout=30)
    if data != [2.0, 4.0] or status != 0:
        raise SystemExit(f"the installed server answered {data} and ended with status {status}")
    print(f"{wheel.name}: installed in a clean environment, served a model, stopped in order")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
