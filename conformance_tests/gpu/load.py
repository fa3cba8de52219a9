"""The load that a server is put under: `penstock bench`, in as many processes as one core is too little."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conformance_tests.server import Running

WARMUP_S = 1.5
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one load."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    server_cpu_us: float  # per request
    client_cpu_share: float  # of one core, of the busiest client


@dataclass(frozen=True, slots=True)
class Generator:
    """Sends the arrays of an .npz file, over and over."""

    environment: Mapping[str, str]
    seconds: float
    processes: int  # at most

    def measure(self, server: Running, model: str, data: Path, protocol: str, concurrency: int) -> Measured:
        """Raises RuntimeError where a request failed."""
        return self.at(server.http, server.grpc, server.process.pid, model, data, protocol, concurrency)

    def at(self, http: str, grpc: str, pid: int, model: str, data: Path, protocol: str, concurrency: int) -> Measured:
        count = min(self.processes, concurrency)
        where = ["--grpc", grpc] if protocol == "grpc" else ["--url", http]
        command = [
            sys.executable, "-m", "penstock.cli", "bench", model, *where, "--protocol", protocol, "--concurrency",
            str(concurrency // count), "--duration", str(self.seconds), "--warmup", str(min(WARMUP_S, self.seconds)),
            "--server-pid", str(pid), "--data", str(data), "--json",
        ]  # fmt: skip
        environment = {**os.environ, **self.environment}
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            for _ in range(count)
        ]
        results = []
        for process in started:
            out, errors = process.communicate(timeout=LIMIT_S)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}\n{out}{errors}")
            [result] = json.loads(out)["results"]
            if result["errors"]:
                raise RuntimeError(f"{model}: {result['errors']} requests failed, the first: {result['first_error']}")
            results.append(result)
        rate = sum(result["requests_per_s"] for result in results)
        # Each client divided all that the server used by its own share of the requests.
        used_us_per_s = statistics.mean(result["server_cpu_us"] * result["requests_per_s"] for result in results)
        return Measured(
            rate,
            statistics.median(result["p50_us"] for result in results),
            max(result["p99_us"] for result in results),
            used_us_per_s / rate,
            max(result["client_cpu_share"] for result in results),
        )
