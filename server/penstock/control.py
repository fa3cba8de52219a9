"""Every control method as a function of plain data, and the table that names them for both protocols."""

from collections.abc import Callable
from typing import Any, TypeAlias

from msgspec import Struct

import penstock
from penstock import model_config, pb
from penstock.auth import Category
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.lifecycle import parse_version
from penstock.model import Model
from penstock.statistics import Duration

# The extensions that are really served, by the protocol's names for them.
EXTENSIONS = (
    "classification", "sequence", "schedule_policy", "model_configuration", "binary_tensor_data", "parameters",
    "statistics",
)  # fmt: skip

Fields: TypeAlias = dict[str, Any]
Call: TypeAlias = Callable[[Engine, Fields], Any]


class Method(Struct, frozen=True):
    """One control method. `call` takes the request's fields and gives the answer in the protocol's JSON shape.

    Over HTTP that is dumped with status 200, over gRPC it fills the RPC's response message; where a protocol has
    another shape, `http_shape` gives (status, JSON) and `grpc_shape` another dict, or the response message itself.
    """

    rpc: str
    http: tuple[tuple[str, str], ...]  # (verb, path) pairs; `{name}` and `{version}` become fields
    call: Call
    category: Category
    keyless: bool = False  # answers callers without an API key, for it tells nothing about models
    blocking: bool = False  # may take long: to be called on a thread of its own
    http_shape: Callable[[Any], tuple[int, Any]] | None = None
    grpc_shape: Callable[[Any], Any] | None = None


def server_live(engine: Engine, _: Fields) -> Fields:
    _refuse_if_exiting(engine, "Server exiting")
    return {"live": engine.lifecycle.is_live()}


def server_ready(engine: Engine, _: Fields) -> Fields:
    _refuse_if_exiting(engine, "Server exiting")
    return {"ready": engine.lifecycle.is_ready()}


def model_ready(engine: Engine, fields: Fields) -> Fields:
    """Raises ServingError for a version that is unknown or not ready, so that a client learns why."""
    model = _model(engine, fields)
    return {"name": model.name, "ready": True}


def server_metadata(engine: Engine, _: Fields) -> Fields:
    return {"name": engine.settings.id, "version": penstock.__version__, "extensions": list(EXTENSIONS)}


def model_metadata(engine: Engine, fields: Fields) -> Fields:
    model = _model(engine, fields)
    signature = model.signature
    return {
        "name": model.name,
        "versions": [model.version] if fields.get("version") else engine.lifecycle.ready_versions(model.name),
        "platform": model.config.platform or model.config.backend,
        "inputs": [
            {"name": spec.name, "datatype": spec.datatype.name, "shape": list(spec.shape)}
            for spec in signature.inputs.values()
        ],
        "outputs": [
            {"name": spec.name, "datatype": spec.datatype.name, "shape": list(spec.shape)}
            for spec in signature.outputs.values()
        ],
        "parameters": {"device": ",".join(model.devices)},
    }


def read_model_config(engine: Engine, fields: Fields) -> pb.ModelConfig:
    return _model(engine, fields).config


def model_statistics(engine: Engine, fields: Fields) -> Fields:
    """Counts of every served version, of one model, or of one version; statistics extension."""
    _refuse_if_exiting(engine, "Server not ready")
    name, version = fields.get("name", ""), fields.get("version", "")
    if not name:
        return {"model_stats": [_statistics(model) for model in engine.lifecycle.models()]}
    versions = engine.lifecycle.ready_versions(name)
    if not versions:
        raise ServingError(Kind.INVALID, f"requested model '{name}' is not available")
    if version:
        wanted = str(parse_version(version))
        if wanted not in versions:
            raise ServingError(Kind.INVALID, f"requested model version is not available for model '{name}'")
        versions = [wanted]
    return {"model_stats": [_statistics(engine.model(name, number)) for number in versions]}


def _statistics(model: Model) -> Fields:
    counts = model.statistics
    memory_bytes = model.memory_bytes
    with counts.lock:
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": counts.last_inference_ms,
            "inference_count": counts.inference_count,
            "execution_count": counts.execution_count,
            "inference_stats": {
                "success": _duration(counts.success),
                "fail": _duration(counts.fail),
                "queue": _duration(counts.queue),
                "compute_input": _duration(counts.compute_input),
                "compute_infer": _duration(counts.compute_infer),
                "compute_output": _duration(counts.compute_output),
                "cache_hit": _duration(counts.cache_hit),
                "cache_miss": _duration(counts.cache_miss),
            },
            "response_stats": {
                str(place): {
                    "compute_infer": _duration(response.compute_infer),
                    "compute_output": _duration(response.compute_output),
                    "success": _duration(response.success),
                    "fail": _duration(response.fail),
                    "empty_response": _duration(response.empty_response),
                    "cancel": _duration(response.cancel),
                }
                for place, response in sorted(counts.responses.items())
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": _duration(batch.compute_input),
                    "compute_infer": _duration(batch.compute_infer),
                    "compute_output": _duration(batch.compute_output),
                }
                for size, batch in sorted(counts.batches.items())
            ],
            "memory_usage": [{"type": "CPU", "id": 0, "byte_size": memory_bytes}] if memory_bytes else [],
        }


def _duration(duration: Duration) -> Fields:
    return {"count": duration.count, "ns": duration.ns}


def _model(engine: Engine, fields: Fields) -> Model:
    _refuse_if_exiting(engine, "Server not ready")
    return engine.model(fields["name"], fields.get("version", ""))


def _refuse_if_exiting(engine: Engine, message: str) -> None:
    if engine.lifecycle.exiting:
        raise ServingError(Kind.UNAVAILABLE, message)


def _health(key: str) -> Callable[[Fields], tuple[int, Fields]]:
    """Health over HTTP is a status: 200 or 400, with a body that OIP's clients read."""
    return lambda answer: (200 if answer[key] else 400, answer)


MODEL = "/v2/models/{name}"
VERSION = "/v2/models/{name}/versions/{version}"

METHODS: tuple[Method, ...] = (
    Method(
        "ServerLive",
        (("GET", "/v2/health/live"),),
        server_live,
        Category.HEALTH,
        keyless=True,
        http_shape=_health("live"),
    ),
    Method(
        "ServerReady",
        (("GET", "/v2/health/ready"),),
        server_ready,
        Category.HEALTH,
        keyless=True,
        http_shape=_health("ready"),
    ),
    Method("ModelReady", (("GET", f"{MODEL}/ready"), ("GET", f"{VERSION}/ready")), model_ready, Category.HEALTH),
    Method("ServerMetadata", (("GET", "/v2"), ("GET", "/v2/")), server_metadata, Category.METADATA),
    Method(
        "ModelStatistics",
        (("GET", "/v2/models/stats"), ("GET", f"{MODEL}/stats"), ("GET", f"{VERSION}/stats")),
        model_statistics,
        Category.STATISTICS,
    ),
    Method("ModelMetadata", (("GET", MODEL), ("GET", VERSION)), model_metadata, Category.METADATA),
    Method(
        "ModelConfig",
        (("GET", f"{MODEL}/config"), ("GET", f"{VERSION}/config")),
        read_model_config,
        Category.MODEL_CONFIG,
        http_shape=lambda config: (200, model_config.to_json(config)),
        grpc_shape=lambda config: pb.ModelConfigResponse(config=config),
    ),
)
