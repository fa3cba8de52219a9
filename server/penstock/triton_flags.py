"""Triton's command line: which of its flags exist here, and why the others do not. None is accepted and ignored."""

from msgspec import Struct

from penstock.settings import OPTIONS


class Flag(Struct, frozen=True):
    """One flag of Triton's server. `penstock` is ours of the same meaning, or None: then refused at start."""

    name: str
    penstock: str | None
    note: str = ""
    planned: bool = False


def _done(*names: str) -> list[Flag]:
    return [Flag(name, name) for name in names]


def _native(*names: str) -> list[Flag]:
    return [Flag(name, name, "with `--grpc-transport native`; grpcio's defaults are the same") for name in names]


def _planned(note: str, *names: str) -> list[Flag]:
    return [Flag(name, None, note, planned=True) for name in names]


def _refused(note: str, *names: str) -> list[Flag]:
    return [Flag(name, None, note) for name in names]


FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        *_done(
            "id", "exit-timeout-secs", "log-verbose", "log-info", "log-warning", "log-error", "log-format", "log-file",
            "model-repository", "model-store", "exit-on-error", "disable-auto-complete-config", "strict-readiness",
            "model-control-mode", "load-model", "model-config-name", "model-load-thread-count", "backend-config",
            "cache-config", "rate-limit", "rate-limit-resource",
            "allow-http", "http-address", "http-port", "http-max-input-size", "http-header-forward-pattern",
            "http-restricted-api", "allow-grpc", "grpc-address", "grpc-port", "grpc-header-forward-pattern",
            "grpc-restricted-protocol",
            "allow-metrics", "metrics-address", "metrics-port", "metrics-config", "allow-cpu-metrics",
            "allow-gpu-metrics", "metrics-interval-ms",
        ),
        *_planned("use --disable-auto-complete-config", "strict-model-config"),
        *_planned("polling comes with the model repository extension", "repository-poll-secs"),
        *_planned("comes with the model repository extension", "model-namespacing", "model-load-retry-count",
                  "model-load-gpu-limit"),
        *_planned("comes with TLS for gRPC; until then put a proxy in front", "grpc-use-ssl", "grpc-use-ssl-mutual",
                  "grpc-server-cert", "grpc-server-key", "grpc-root-cert"),
        *_native("grpc-keepalive-time", "grpc-keepalive-timeout", "grpc-keepalive-permit-without-calls",
                 "grpc-http2-max-pings-without-data", "grpc-http2-min-recv-ping-interval-without-data",
                 "grpc-http2-max-ping-strikes", "grpc-max-connection-age", "grpc-max-connection-age-grace"),
        *_planned("answers are sent as they are; requests may be compressed", "grpc-infer-response-compression-level"),
        *_planned("comes with the trace extension", "trace-config", "trace-file", "trace-level", "trace-rate",
                  "trace-count", "trace-log-frequency"),
        *_refused("use --cache-config local,size=BYTES", "response-cache-byte-size"),
        *_planned("comes with the shared memory extension", "allow-client-shm"),
        *_planned("comes with several server processes on one port", "reuse-http-port", "reuse-grpc-port"),
        *_refused("the HTTP server is one event loop, which needs no thread count", "http-thread-count"),
        *_refused("the gRPC server is one event loop, which needs no thread count", "grpc-infer-thread-count"),
        *_refused("messages are not pooled", "grpc-infer-allocation-pool-size", "grpc-max-response-pool-size"),
        *_refused("SageMaker's front end is not served", "allow-sagemaker", "sagemaker-port",
                  "sagemaker-safe-port-range", "sagemaker-thread-count"),
        *_refused("Vertex AI's front end is not served", "allow-vertex-ai", "vertex-ai-port", "vertex-ai-thread-count",
                  "vertex-ai-default-model"),
        *_refused("names a directory of Triton's shared libraries; runtimes are Python packages here",
                  "backend-directory", "repoagent-directory", "cache-directory"),
        *_refused("ONNX Runtime owns device memory here; use its gpu_mem_limit", "pinned-memory-pool-byte-size",
                  "cuda-memory-pool-byte-size", "cuda-virtual-address-size", "enable-peer-access"),
        *_refused("ONNX Runtime decides which devices it can run on", "min-supported-compute-capability"),
        *_refused("there are no buffer manager threads here", "buffer-manager-thread-count"),
        *_refused("use taskset or numactl on the process", "host-policy"),
    )
}  # fmt: skip


def markdown() -> str:
    """`FLAGS` as a Markdown table, with the options that only Penstock has below."""
    rows = []
    for flag in FLAGS.values():
        state = "done" if flag.penstock else "planned" if flag.planned else "refused at start"
        rows.append(f"| `--{flag.name}` | {state} | {flag.note} |")
    own = [option for option in OPTIONS.values() if option.name.replace("_", "-") not in FLAGS]
    ours = [f"| `{option.flag}` | {option.help} |" for option in own]
    return "\n".join(
        ("| Triton's flag | Penstock | Note |", "|---|---|---|", *rows, "",
         "| Only in Penstock | Meaning |", "|---|---|", *ours, "")
    )  # fmt: skip
