"""Every server option, once. The flag `--http-port`, the variable `PENSTOCK_HTTP_PORT` and the TOML key `http_port`
follow from the field's name; type, default and help text from its declaration. Names are Triton's where the meaning is.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Struct, field

from penstock.errors import Kind, ServingError

PREFIX = "PENSTOCK_"
FILE_VARIABLE = f"{PREFIX}CONFIG"
KEY_VARIABLE = f"{PREFIX}API_KEY"  # of the commands that ask a server: the key they show; no option of a server
# Kubernetes gives these to every container beside a service that is called penstock; they are no options.
SERVICE_LINK = re.compile(
    rf"{PREFIX}(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)?)"
)

# What only our own HTTP/2 can honour.
NATIVE = (
    "grpc_keepalive_time", "grpc_keepalive_timeout", "grpc_keepalive_permit_without_calls",
    "grpc_http2_max_pings_without_data", "grpc_http2_min_recv_ping_interval_without_data",
    "grpc_http2_max_ping_strikes", "grpc_max_connection_age", "grpc_max_connection_age_grace",
)  # fmt: skip
MALLOC_LIMIT = 32 << 20  # the largest threshold that glibc takes


def _option(
    default: Any, help: str, group: str, *, metavar: str = "", aliases: Sequence[str] = (), switch: bool = False,
    separator: str = os.pathsep,
) -> Any:  # fmt: skip
    _described.append((help, group, metavar, tuple(aliases), switch, separator))
    return field(default=default)


_described: list[tuple[str, str, str, tuple[str, ...], bool, str]] = []  # the options, in the order of Settings


class Settings(Struct, frozen=True):
    """What `penstock serve` can be told. Sizes are bytes, times are in the unit that the name ends in."""

    model_repository: tuple[str, ...] = _option(
        (), "a model file, a folder of model files, or a Triton model repository", "models",
        metavar="PATH", aliases=("model_store",),
    )  # fmt: skip
    model_control_mode: Literal["none", "explicit"] = _option(
        "none", "which models load: all that are found, or only those named by --load-model and through the API",
        "models",
    )  # fmt: skip
    load_model: tuple[str, ...] = _option(
        (), "a model to load at start in explicit mode; '*' alone means all", "models", metavar="NAME"
    )
    exit_on_error: bool = _option(True, "exit when a model fails to load at start", "models")
    exit_on_device_error: bool = _option(
        False, "end with status 3 when a GPU is lost to this process, so that a supervisor starts it anew; else models "
        "on the CPU go on", "models",
    )  # fmt: skip
    strict_readiness: bool = _option(True, "be ready only while every model that was loaded is", "models")
    disable_auto_complete_config: bool = _option(False, "require a complete config.pbtxt of every model", "models")
    model_config_name: str = _option(
        "", "prefer configs/NAME.pbtxt of a model over its config.pbtxt", "models", metavar="NAME"
    )
    model_load_thread_count: int = _option(4, "how many models load at the same time", "models", metavar="N")
    default_max_batch_size: int = _option(
        0, "give every model that can be batched and does not say so this max_batch_size (Triton's default is 4); "
        "0 completes only models whose first axis is named like a batch axis", "models", metavar="N",
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "where models run whose configuration leaves it open; cuda fails where CUDA does not work, "
        "auto falls back to the CPU and says so", "models",
    )  # fmt: skip
    backend_config: tuple[str, ...] = _option(
        (), "a setting of a runtime, such as onnxruntime,intra_op_thread_count=2", "models", metavar="NAME,KEY=VALUE"
    )

    rate_limit: Literal["off", "execution_count"] = _option(
        "off", "let instances run only while the resources are free that their rate_limiter names, by its priority",
        "models",
    )  # fmt: skip
    rate_limit_resource: tuple[str, ...] = _option(
        (), "how much there is of a resource, where it is not as much as the instance asks for that asks for most",
        "models", metavar="NAME:COUNT[:DEVICE]",
    )  # fmt: skip
    cache_config: str = _option(
        "", "keep answers of models with response_cache { enable: true }, in so many bytes", "models",
        metavar="local,size=BYTES",
    )  # fmt: skip

    host: str = _option("127.0.0.1", "the address that all ports listen on; 0.0.0.0 for every interface", "listening")
    http_address: str = _option("", "the address for HTTP, where it is not --host", "listening", metavar="ADDRESS")
    http_port: int = _option(8000, "HTTP port; 0 takes a free one", "listening", metavar="PORT")
    grpc_address: str = _option("", "the address for gRPC, where it is not --host", "listening", metavar="ADDRESS")
    grpc_port: int = _option(8001, "gRPC port; 0 takes a free one", "listening", metavar="PORT")
    metrics_address: str = _option(
        "", "the address for metrics, where it is not that of HTTP", "listening", metavar="ADDRESS"
    )
    metrics_port: int = _option(8002, "port for Prometheus metrics; 0 takes a free one", "listening", metavar="PORT")
    allow_http: bool = _option(True, "serve HTTP", "listening")
    allow_grpc: bool = _option(True, "serve gRPC", "listening")
    allow_metrics: bool = _option(True, "serve metrics", "listening")
    announce: Literal["", "json"] = _option(
        "", "print one line on standard output when ready, naming the ports", "listening"
    )
    allow_gpu_metrics: bool = _option(True, "tell the GPUs' memory, load and power too, where NVML does", "listening")
    allow_cpu_metrics: bool = _option(True, "tell the machine's CPU and memory use with the metrics", "listening")
    metrics_interval_ms: int = _option(
        2000, "how old what the metrics tell of the machine may be", "listening", metavar="MS"
    )
    metrics_config: tuple[str, ...] = _option(
        (), "counter_latencies=false leaves Triton's cumulative durations out of the metrics, histogram_latencies=true "
        "adds its histogram of first responses, summary_latencies=true its quantiles over the last minute, which "
        "summary_quantiles=0.5:0.05,0.99:0.001 chooses", "listening", metavar="NAME=VALUE", separator=";",
    )  # fmt: skip
    exit_timeout_secs: int = _option(
        30, "how long accepted requests may take to finish once the server is told to stop", "listening", metavar="S"
    )

    http_max_input_size: int = _option(
        64 << 20, "limit on the JSON of a request, a raw body, and a body once it is decompressed", "HTTP",
        metavar="BYTES",
    )  # fmt: skip
    http_max_body_size: int = _option(
        2**31 - 1, "limit on a request body as a whole, binary tensors included", "HTTP", metavar="BYTES"
    )
    http_max_header_size: int = _option(
        64 << 10, "limit on the request line and headers of a request", "HTTP", metavar="BYTES"
    )
    http_header_timeout_secs: int = _option(
        60, "how long a client may take from its first byte to the end of the headers", "HTTP", metavar="S"
    )
    http_keep_alive_secs: int = _option(75, "how long an idle connection stays open", "HTTP", metavar="S")
    http_fast_lane: bool = _option(
        True, "serve inferences past the ASGI application, for less CPU time; the answers are the same", "HTTP"
    )
    http_header_forward_pattern: str = _option(
        "", "request headers whose name matches become string parameters of the request", "HTTP", metavar="REGEX"
    )
    http_response_compression: Literal["auto", "on", "off"] = _option(
        "auto", "compress answers to clients that accept it: JSON over 16 KB only, always, never", "HTTP"
    )
    json_non_finite: Literal["string", "literal"] = _option(
        "string", 'NaN and infinities in JSON answers: as strings ("NaN"), or as the bare literals that Triton writes',
        "HTTP",
    )  # fmt: skip

    grpc_max_message_size: int = _option(2**31 - 1, "limit on a message, either way", "gRPC", metavar="BYTES")
    grpc_header_forward_pattern: str = _option(
        "", "request metadata whose key matches becomes string parameters of the request", "gRPC", metavar="REGEX"
    )

    grpc_transport: Literal["grpcio", "native"] = _option(
        "grpcio", "who speaks HTTP/2: the grpcio library, or this server itself, for less CPU time per call", "gRPC"
    )
    grpc_keepalive_time: int = _option(
        7_200_000, "after how long a silence a client is sent a ping [native]", "gRPC", metavar="MS"
    )
    grpc_keepalive_timeout: int = _option(
        20_000, "how long a client may take to answer it, before its connection is closed [native]", "gRPC",
        metavar="MS",
    )  # fmt: skip
    grpc_keepalive_permit_without_calls: bool = _option(
        False, "send pings, and let clients send them, while there is no call [native]", "gRPC"
    )
    grpc_http2_max_pings_without_data: int = _option(
        2, "how many pings a client is sent between answers; 0 for any number [native]", "gRPC", metavar="N"
    )
    grpc_http2_min_recv_ping_interval_without_data: int = _option(
        300_000, "how long a client must wait between its pings while it is sent no data [native]", "gRPC",
        metavar="MS",
    )  # fmt: skip
    grpc_http2_max_ping_strikes: int = _option(
        2, "how many pings may come too early before the connection is closed; 0 for any number [native]", "gRPC",
        metavar="N",
    )  # fmt: skip
    grpc_max_connection_age: int = _option(
        0, "after how long a connection is closed, once its calls are answered; 0 for never [native]", "gRPC",
        metavar="MS",
    )  # fmt: skip
    grpc_max_connection_age_grace: int = _option(
        0, "how long those calls may take; 0 for any time [native]", "gRPC", metavar="MS"
    )

    max_tensors: int = _option(1024, "limit on the input tensors of a request", "limits", metavar="N")
    max_rank: int = _option(32, "limit on the number of dimensions of a tensor", "limits", metavar="N")

    api_keys: str = _option(
        "", "ask every caller for an API key of this file, which `penstock keys` writes", "access", metavar="FILE"
    )
    http_restricted_api: tuple[str, ...] = _option(
        (), "serve these categories of methods over HTTP only to requests with the header HEADER: VALUE", "access",
        metavar="CATEGORY,...:HEADER=VALUE", separator=";",
    )  # fmt: skip
    grpc_restricted_protocol: tuple[str, ...] = _option(
        (), "serve these categories of methods over gRPC only to calls with the metadata "
        "triton-grpc-protocol-HEADER: VALUE", "access", metavar="CATEGORY,...:HEADER=VALUE", separator=";",
    )  # fmt: skip

    job_store: str = _option(
        "", "where jobs are kept: sqlite:PATH, redis://HOST:PORT/DB or postgresql://HOST:PORT/NAME; none switches the "
        "job API off; by default a SQLite file for these repositories and this port, under $XDG_STATE_HOME/penstock",
        "jobs", metavar="URL",
    )  # fmt: skip
    job_max_run_size: int = _option(
        10 << 20, "limit on the body of a job that is queued, and on its result", "jobs", metavar="BYTES"
    )
    job_max_runsync_size: int = _option(
        20 << 20, "limit on the body of a job that its sender waits for, and on its result", "jobs", metavar="BYTES"
    )
    job_execution_timeout_secs: int = _option(600, "how long a job may run that does not say so", "jobs", metavar="S")
    job_ttl_secs: int = _option(
        86400, "how long a job lives that does not say so, waiting and running", "jobs", metavar="S"
    )
    job_retention_secs: int = _option(1800, "how long the result of a queued job is kept", "jobs", metavar="S")
    job_sync_retention_secs: int = _option(
        60, "how long the result of a job is kept that its sender waited for", "jobs", metavar="S"
    )
    job_policy_bounds: Literal["reject", "clamp"] = _option(
        "reject", "what becomes of times in a job's policy that are out of bounds", "jobs"
    )
    job_queue_limit: int = _option(
        0, "how many jobs of an endpoint may wait, before more are refused with 429; 0: any number", "jobs", metavar="N"
    )
    job_rate_limit: tuple[str, ...] = _option(
        (), "how often each caller may use an operation of an endpoint, such as run=1000/10 (requests, seconds)",
        "jobs", metavar="OPERATION=N/S",
    )  # fmt: skip
    job_echo_input: bool = _option(False, "show a job's input with its status, as RunPod once did", "jobs")
    job_gpu: str = _option("", "show this as `gpu` with a job's status, as RunPod once did", "jobs", metavar="CLASS")
    webhook_allow_private: bool = _option(
        False, "post webhooks also to private, loopback and link-local addresses", "jobs"
    )
    webhook_secret: str = _option(
        "", "sign webhooks with HMAC-SHA256 in the header X-Penstock-Signature; better given as the variable "
        "PENSTOCK_WEBHOOK_SECRET", "jobs", metavar="TEXT",
    )  # fmt: skip

    malloc_threshold: int = _option(
        32 << 20, "keep memory blocks up to this size for reuse instead of returning them to the system, which saves "
        "page faults on large tensors and holds tens of MB, up to twice this size in each of 4 arenas; at most 32 MiB, "
        "0 leaves malloc as it is", "server", metavar="BYTES",
    )  # fmt: skip
    id: str = _option("penstock", "the server's name in its metadata", "server", metavar="NAME")
    log_verbose: int = _option(
        0, "1 logs what the server does in detail, 2 also what its libraries do", "server", metavar="LEVEL", switch=True
    )
    log_info: bool = _option(True, "log what the server does", "server")
    log_warning: bool = _option(True, "log warnings", "server")
    log_error: bool = _option(True, "log errors", "server")
    log_format: Literal["default", "ISO8601", "json"] = _option(
        "default", "how log lines begin, for people to read; json writes one object per line, for programs", "server"
    )
    access_log: bool = _option(
        False, "log a line for each request that was answered: who asked for what, its status, time, bytes and id",
        "server",
    )  # fmt: skip
    log_file: str = _option("", "write the log to this file instead of standard error", "server", metavar="PATH")

    def address(self, door: Literal["http", "grpc", "metrics"]) -> tuple[str, int]:
        """Where a door listens."""
        host: str = getattr(self, f"{door}_address") or (self.http_address if door == "metrics" else "") or self.host
        port: int = getattr(self, f"{door}_port")
        return host, port

    def runtime_settings(self, runtime: str) -> dict[str, str]:
        """The `--backend-config` entries for one runtime. Those without a name are for all; of equal keys, the last.

        Raises ServingError(INVALID) for an entry that is no setting.
        """
        chosen = {}
        for entry in self.backend_config:
            head, equals, value = entry.partition("=")
            name, _, key = head.rpartition(",")
            if not equals or not key:
                raise ServingError(Kind.INVALID, f"--backend-config expects NAME,KEY=VALUE, got '{entry}'")
            if name in ("", runtime):
                chosen[key] = value
        if self.default_max_batch_size:
            chosen.setdefault("default-max-batch-size", str(self.default_max_batch_size))
        return chosen

    def cache_bytes(self) -> int | None:
        """The size of the response cache; None: there is none. Raises ServingError(INVALID)."""
        if not self.cache_config:
            return None
        size = self.cache_config.removeprefix("local,size=")
        if size == self.cache_config or not (size.isascii() and size.isdigit()):
            raise ServingError(Kind.INVALID, f"--cache-config expects local,size=BYTES, got '{self.cache_config}'")
        return int(size)

    def metrics_options(self) -> dict[str, bool]:
        """Which families of metrics are shown that can be switched, by Triton's names. Raises ServingError(INVALID)."""
        chosen = dict(METRICS_OPTIONS)
        for entry in self.metrics_config:
            name, _, value = entry.partition("=")
            if name == QUANTILES:
                continue
            if name not in METRICS_OPTIONS or value.lower() not in BOOLS:
                known = ", ".join(f"{option}=true|false" for option in METRICS_OPTIONS)
                raise ServingError(
                    Kind.INVALID, f"--metrics-config expects one of {known}, {QUANTILES}=Q:ERROR,..., got '{entry}'"
                )
            chosen[name] = BOOLS[value.lower()]
        return chosen

    def summary_quantiles(self) -> tuple[float, ...]:
        """The quantiles of summaries. Ours are exact, so the error that may stand with each is only checked.

        Raises ServingError(INVALID).
        """
        quantiles: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 0.999)
        for entry in self.metrics_config:
            name, _, value = entry.partition("=")
            if name != QUANTILES:
                continue
            try:
                pairs = [(float(quantile), float(error or 0)) for quantile, _, error in (
                    part.partition(":") for part in value.strip('"').split(",")
                )]  # fmt: skip
            except ValueError:
                pairs = []
            if not pairs or not all(0 <= number <= 1 for pair in pairs for number in pair):
                raise ServingError(
                    Kind.INVALID, f"--metrics-config {QUANTILES} expects QUANTILE:ERROR,... from 0 to 1, got '{value}'"
                )
            quantiles = tuple(quantile for quantile, _ in pairs)
        return quantiles


class Option(Struct, frozen=True):
    """One field of Settings, as the outside sees it."""

    name: str  # the TOML key
    type: type[bool] | type[int] | type[str]
    repeated: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    group: str
    metavar: str
    aliases: tuple[str, ...]
    switch: bool  # a number that may also be switched on and off by itself, as in `--log-verbose`
    separator: str  # between the values of a repeated option, where one variable holds them all

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def parse(self, text: str, source: str) -> Any:
        """A value from text, as a flag or a variable gives it. Raises ServingError(INVALID) naming `source`."""
        try:
            if self.type is bool:
                return BOOLS[text.lower()]
            if self.switch and text.lower() in ("true", "false"):
                return int(text.lower() == "true")
            if self.type is int:
                return int(text)
        except (KeyError, ValueError):
            wanted = "true or false" if self.type is bool else "a whole number"
            raise ServingError(Kind.INVALID, f"{source} expects {wanted}, got '{text}'") from None
        if self.choices and text not in self.choices:
            raise ServingError(
                Kind.INVALID, f"{source} expects one of {', '.join(c for c in self.choices if c)}, got '{text}'"
            )
        return text


METRICS_OPTIONS = {"counter_latencies": True, "histogram_latencies": False, "summary_latencies": False}
QUANTILES = "summary_quantiles"
BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _options() -> dict[str, Option]:
    hints = get_type_hints(Settings)
    options = {}
    defaults = Settings.__struct_defaults__
    for name, default, described in zip(Settings.__struct_fields__, defaults, _described, strict=True):
        hint = hints[name]
        repeated = get_origin(hint) is tuple
        item = get_args(hint)[0] if repeated else hint
        choices = get_args(item) if get_origin(item) is Literal else ()
        options[name] = Option(name, str if choices else item, repeated, choices, default, *described)
    return options


OPTIONS: dict[str, Option] = _options()


def from_sources(
    flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ, file: Path | None = None
) -> Settings:
    """Settings from flags, environment variables and a TOML file; of these, the first that names an option decides it.

    `flags` holds parsed values by field name; without `file`, the variable PENSTOCK_CONFIG may name one. Raises
    ServingError(INVALID) for an unknown name, with the nearest known one, and for a value of the wrong type or out of
    range.
    """
    values: dict[str, Any] = {}
    named = environment.get(FILE_VARIABLE)
    if file is None and named:
        file = Path(named)
    if file is not None:
        values.update(_from_toml(file))
    for variable, text in environment.items():
        if variable in (FILE_VARIABLE, KEY_VARIABLE) or SERVICE_LINK.fullmatch(variable):
            continue
        if variable.startswith(PREFIX):
            name = variable.removeprefix(PREFIX).lower()
            option = OPTIONS.get(name)
            if option is None:
                raise ServingError(
                    Kind.INVALID, f"unknown environment variable {variable}{nearest(name, PREFIX, upper=True)}"
                )
            parts = text.split(option.separator) if option.repeated else [text]
            parsed = [option.parse(part, variable) for part in parts if part or not option.repeated]
            values[name] = tuple(parsed) if option.repeated else parsed[0]
    values.update(flags)
    settings = Settings(**values)
    _check(settings)
    return settings


def _from_toml(file: Path) -> dict[str, Any]:
    import tomllib  # which a start without a file does without

    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ServingError(Kind.INVALID, f"cannot read settings from '{file}': {error}") from error
    values: dict[str, Any] = {}
    for name, value in table.items():
        option = OPTIONS.get(name)
        if option is None:
            raise ServingError(Kind.INVALID, f"unknown key '{name}' in '{file}'{nearest(name)}")
        items = value if option.repeated and isinstance(value, list) else [value]
        for item in items:
            if type(item) is not option.type or (option.choices and item not in option.choices):
                wanted = ", ".join(filter(None, option.choices)) or option.type.__name__
                raise ServingError(Kind.INVALID, f"key '{name}' in '{file}' expects {wanted}, got {item!r}")
        values[name] = tuple(items) if option.repeated else value
    return values


def nearest(name: str, prefix: str = "", *, upper: bool = False, dashes: bool = False) -> str:
    """`; did you mean …?` for the option whose name comes nearest to `name`, or nothing."""
    import difflib  # as above

    known = {alias: option.name for option in OPTIONS.values() for alias in (option.name, *option.aliases)}
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    if not close:
        return ""
    best = known[close[0]]
    best = best.replace("_", "-") if dashes else best.upper() if upper else best
    return f"; did you mean {prefix}{best}?"


def _check(settings: Settings) -> None:
    for door in ("http", "grpc", "metrics"):
        port = getattr(settings, f"{door}_port")
        if not 0 <= port <= 65535:
            raise ServingError(Kind.INVALID, f"--{door}-port expects a port from 0 to 65535, got {port}")
    for name in ("http_max_input_size", "http_max_body_size", "http_max_header_size", "http_header_timeout_secs",
                 "http_keep_alive_secs", "model_load_thread_count", "max_tensors", "max_rank",
                 "grpc_max_message_size", "job_max_run_size", "job_max_runsync_size", "job_execution_timeout_secs",
                 "job_ttl_secs", "job_retention_secs", "job_sync_retention_secs"):  # fmt: skip
        if getattr(settings, name) < 1:
            raise ServingError(
                Kind.INVALID, f"{OPTIONS[name].flag} expects a positive number, got {getattr(settings, name)}"
            )
    for name in (
        "exit_timeout_secs",
        "metrics_interval_ms",
        "default_max_batch_size",
        "log_verbose",
        "job_queue_limit",
    ):
        if getattr(settings, name) < 0:
            raise ServingError(
                Kind.INVALID, f"{OPTIONS[name].flag} must not be negative, got {getattr(settings, name)}"
            )
    if not 0 <= settings.malloc_threshold <= MALLOC_LIMIT:
        raise ServingError(
            Kind.INVALID, f"--malloc-threshold expects 0 to {MALLOC_LIMIT} bytes, got {settings.malloc_threshold}"
        )
    for name in NATIVE:
        value, least = getattr(settings, name), int(name in ("grpc_keepalive_time", "grpc_keepalive_timeout"))
        if value < least:
            raise ServingError(Kind.INVALID, f"{OPTIONS[name].flag} expects a number from {least} up, got {value}")
        if settings.grpc_transport != "native" and value != OPTIONS[name].default:
            raise ServingError(Kind.INVALID, f"{OPTIONS[name].flag} needs --grpc-transport native")
    settings.runtime_settings("")  # raises what is wrong with an entry
    settings.cache_bytes()
    settings.metrics_options()
    settings.summary_quantiles()
    if settings.load_model and settings.model_control_mode != "explicit":
        raise ServingError(Kind.INVALID, "--load-model needs --model-control-mode explicit")
    if "*" in settings.load_model and len(settings.load_model) > 1:
        raise ServingError(Kind.INVALID, "Wildcard model name '*' must be the ONLY startup model if specified at all.")
