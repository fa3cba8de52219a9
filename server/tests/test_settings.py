"""An option is named once: its flag, variable and TOML key follow, and the first of these that names it decides."""

import os
from pathlib import Path
from typing import Any

import pytest
from penstock.errors import Kind, ServingError
from penstock.settings import NATIVE, OPTIONS, Option, Settings, from_sources


def settings(
    tmp_path: Path,
    flags: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
    toml: str | None = None,
) -> Settings:
    file = None
    if toml is not None:
        file = tmp_path / "penstock.toml"
        file.write_text(toml)
    return from_sources(flags or {}, variables or {}, file)


def refused(tmp_path: Path, **sources: Any) -> str:
    with pytest.raises(ServingError) as caught:
        settings(tmp_path, **sources)
    assert caught.value.kind is Kind.INVALID
    return caught.value.message.replace(str(tmp_path), "DIR")


def test_the_defaults_are_the_protocols() -> None:
    made = from_sources({}, {})
    assert (made.http_port, made.grpc_port, made.metrics_port) == (8000, 8001, 8002)
    assert (made.exit_timeout_secs, made.http_max_input_size, made.model_load_thread_count) == (30, 67108864, 4)
    assert (made.exit_on_error, made.strict_readiness, made.model_control_mode, made.log_verbose) == (
        True,
        True,
        "none",
        0,
    )
    assert made == Settings()


@pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_has_its_names_and_a_help_text(option: Option) -> None:
    assert option.flag == "--" + option.name.replace("_", "-")
    assert option.variable == "PENSTOCK_" + option.name.upper()
    assert option.help
    assert option.group
    assert option.type in (bool, int, str)
    assert not option.choices or option.default in option.choices


def test_a_flag_decides_before_a_variable_and_a_variable_before_the_file(tmp_path: Path) -> None:
    made = settings(
        tmp_path,
        flags={"http_port": 1},
        variables={"PENSTOCK_HTTP_PORT": "2", "PENSTOCK_GRPC_PORT": "2"},
        toml="http_port = 3\ngrpc_port = 3\nmetrics_port = 3",
    )
    assert (made.http_port, made.grpc_port, made.metrics_port) == (1, 2, 3)


def test_a_variable_may_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("http_port = 4")
    (tmp_path / "b.toml").write_text("http_port = 5")
    variables = {"PENSTOCK_CONFIG": str(tmp_path / "a.toml")}
    assert from_sources({}, variables).http_port == 4
    assert from_sources({}, variables, tmp_path / "b.toml").http_port == 5
    assert from_sources({}, {"PENSTOCK_CONFIG": ""}).http_port == 8000


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("PENSTOCK_ALLOW_GRPC", "false", "allow_grpc", False),
        ("PENSTOCK_ALLOW_GRPC", "TRUE", "allow_grpc", True),
        ("PENSTOCK_ALLOW_GRPC", "0", "allow_grpc", False),
        ("PENSTOCK_LOG_VERBOSE", "true", "log_verbose", 1),
        ("PENSTOCK_LOG_VERBOSE", "False", "log_verbose", 0),
        ("PENSTOCK_LOG_VERBOSE", "2", "log_verbose", 2),
        ("PENSTOCK_DEVICE", "cpu", "device", "cpu"),
        ("PENSTOCK_MODEL_REPOSITORY", os.pathsep.join(["a", "b"]), "model_repository", ("a", "b")),
        ("PENSTOCK_MODEL_REPOSITORY", "", "model_repository", ()),
        ("PENSTOCK_HTTP_ADDRESS", "", "http_address", ""),
        ("PENSTOCK_HTTP_RESTRICTED_API", "trace:a=b:c;logging:d=e", "http_restricted_api",
         ("trace:a=b:c", "logging:d=e")),
        ("PENSTOCK_GRPC_RESTRICTED_PROTOCOL", "trace:a=b", "grpc_restricted_protocol", ("trace:a=b",)),
    ],
)  # fmt: skip
def test_variables_are_read_by_the_type_of_their_option(
    tmp_path: Path, variable: str, text: str, name: str, value: Any
) -> None:
    got = getattr(settings(tmp_path, variables={variable: text}), name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("toml", "name", "value"),
    [
        ("allow_http = false", "allow_http", False),
        ("model_repository = ['a', 'b']", "model_repository", ("a", "b")),
        ("model_repository = 'a'", "model_repository", ("a",)),
        ("log_format = 'ISO8601'", "log_format", "ISO8601"),
    ],
)
def test_toml_is_read_by_the_type_of_its_option(tmp_path: Path, toml: str, name: str, value: Any) -> None:
    assert getattr(settings(tmp_path, toml=toml), name) == value


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PENSTOCK_HTTP_PRT": "1"},
         "unknown environment variable PENSTOCK_HTTP_PRT; did you mean PENSTOCK_HTTP_PORT?"),
        ({"PENSTOCK_ZZZZ": "1"}, "unknown environment variable PENSTOCK_ZZZZ"),
        ({"PENSTOCK_HTTP_PORT": "eighty"}, "PENSTOCK_HTTP_PORT expects a whole number, got 'eighty'"),
        ({"PENSTOCK_HTTP_PORT": "true"}, "PENSTOCK_HTTP_PORT expects a whole number, got 'true'"),
        ({"PENSTOCK_ALLOW_HTTP": "maybe"}, "PENSTOCK_ALLOW_HTTP expects true or false, got 'maybe'"),
        ({"PENSTOCK_DEVICE": "tpu"}, "PENSTOCK_DEVICE expects one of auto, cpu, cuda, got 'tpu'"),
        ({"PENSTOCK_ANNOUNCE": "xml"}, "PENSTOCK_ANNOUNCE expects one of json, got 'xml'"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_named(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    assert refused(tmp_path, variables=variables) == message


def test_variables_of_others_are_no_options(tmp_path: Path) -> None:
    links = {
        "PENSTOCK_SERVICE_HOST": "10.0.0.1",
        "PENSTOCK_SERVICE_PORT": "80",
        "PENSTOCK_SERVICE_PORT_HTTP": "80",
        "PENSTOCK_PORT": "tcp://10.0.0.1:80",
        "PENSTOCK_PORT_80_TCP": "tcp://10.0.0.1:80",
        "PENSTOCK_PORT_80_TCP_ADDR": "10.0.0.1",
        "HOME": "/",
        "XPENSTOCK_HTTP_PORT": "1",
    }
    assert settings(tmp_path, variables=links) == Settings()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("http_prt = 1", "unknown key 'http_prt' in 'DIR/penstock.toml'; did you mean http_port?"),
        ("http_port = '1'", "key 'http_port' in 'DIR/penstock.toml' expects int, got '1'"),
        ("http_port = true", "key 'http_port' in 'DIR/penstock.toml' expects int, got True"),
        ("http_port = [1]", "key 'http_port' in 'DIR/penstock.toml' expects int, got [1]"),
        ("device = 'tpu'", "key 'device' in 'DIR/penstock.toml' expects auto, cpu, cuda, got 'tpu'"),
        ("model_repository = [1]", "key 'model_repository' in 'DIR/penstock.toml' expects str, got 1"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, toml: str, message: str) -> None:
    assert refused(tmp_path, toml=toml) == message


@pytest.mark.parametrize("content", [None, b"http_port = ", b"\xff"], ids=["absent", "no TOML", "no text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "penstock.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ServingError, match=r"^cannot read settings from '.*penstock\.toml': "):
        from_sources({}, {}, file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http_port": 65536}, "--http-port expects a port from 0 to 65535, got 65536"),
        ({"grpc_port": -1}, "--grpc-port expects a port from 0 to 65535, got -1"),
        ({"http_max_input_size": 0}, "--http-max-input-size expects a positive number, got 0"),
        ({"model_load_thread_count": 0}, "--model-load-thread-count expects a positive number, got 0"),
        ({"exit_timeout_secs": -1}, "--exit-timeout-secs must not be negative, got -1"),
        ({"default_max_batch_size": -1}, "--default-max-batch-size must not be negative, got -1"),
        ({"load_model": ("m",)}, "--load-model needs --model-control-mode explicit"),
        ({"load_model": ("*", "m"), "model_control_mode": "explicit"},
         "Wildcard model name '*' must be the ONLY startup model if specified at all."),
        ({"backend_config": ("onnxruntime,threads",)},
         "--backend-config expects NAME,KEY=VALUE, got 'onnxruntime,threads'"),
        ({"backend_config": ("onnxruntime,=1",)}, "--backend-config expects NAME,KEY=VALUE, got 'onnxruntime,=1'"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, flags=flags) == message


@pytest.mark.parametrize(
    ("entries", "batch_size", "chosen"),
    [
        ((), 0, {}),
        (("onnxruntime,a=1", "other,b=2"), 0, {"a": "1"}),
        ((",a=1", "b=2"), 0, {"a": "1", "b": "2"}),
        (("onnxruntime,a=1", "onnxruntime,a=2"), 0, {"a": "2"}),
        (("onnxruntime,a=x=y,z",), 0, {"a": "x=y,z"}),
        ((), 8, {"default-max-batch-size": "8"}),
        (("onnxruntime,default-max-batch-size=4",), 8, {"default-max-batch-size": "4"}),
    ],
)
def test_a_runtime_gets_the_settings_that_are_for_it_or_for_all(
    entries: tuple[str, ...], batch_size: int, chosen: dict[str, str]
) -> None:
    made = Settings(backend_config=entries, default_max_batch_size=batch_size)
    assert made.runtime_settings("onnxruntime") == chosen


def test_a_door_listens_on_its_own_address_or_the_hosts() -> None:
    made = Settings(host="::", grpc_address="10.0.0.1", http_port=80)
    assert (made.address("http"), made.address("grpc"), made.address("metrics")) == (
        ("::", 80),
        ("10.0.0.1", 8001),
        ("::", 8002),
    )
    assert Settings(http_address="10.0.0.2").address("metrics") == ("10.0.0.2", 8002)
    assert Settings(http_address="10.0.0.2", metrics_address="10.0.0.3").address("metrics") == ("10.0.0.3", 8002)


@pytest.mark.parametrize("name", NATIVE)
def test_what_only_the_native_transport_can_is_refused_with_grpcio(name: str) -> None:
    option = OPTIONS[name]
    value = not option.default if option.type is bool else option.default + 1
    assert getattr(from_sources({"grpc_transport": "native", name: value}, {}), name) == value
    with pytest.raises(ServingError, match=f"^{option.flag} needs --grpc-transport native$"):
        from_sources({name: value}, {})
    assert from_sources({name: option.default}, {}) == from_sources({}, {})


def test_the_allocator_s_threshold_is_within_what_it_takes() -> None:
    assert from_sources({"malloc_threshold": 0}, {}).malloc_threshold == 0
    with pytest.raises(ServingError, match="--malloc-threshold expects 0 to 33554432 bytes, got 33554433"):
        from_sources({"malloc_threshold": (32 << 20) + 1}, {})


@pytest.mark.parametrize(("text", "size"), [("", None), ("local,size=1048576", 1048576), ("local,size=0", 0)])
def test_the_cache_has_the_size_that_it_is_told(text: str, size: int | None) -> None:
    assert Settings(cache_config=text).cache_bytes() == size


@pytest.mark.parametrize("text", ["local", "redis,host=x", "local,size=", "local,size=-1", "local,size=1k", "size=1"])
def test_another_cache_is_refused(text: str) -> None:
    with pytest.raises(ServingError) as caught:
        from_sources({"cache_config": text}, environment={})
    assert caught.value.message == f"--cache-config expects local,size=BYTES, got '{text}'"


def test_metrics_are_switched_by_name() -> None:
    usual = {"counter_latencies": True, "histogram_latencies": False, "summary_latencies": False}
    assert Settings().metrics_options() == usual
    made = Settings(metrics_config=("counter_latencies=0", "histogram_latencies=True", "summary_quantiles=0.5"))
    assert made.metrics_options() == usual | {"counter_latencies": False, "histogram_latencies": True}


@pytest.mark.parametrize(
    ("entry", "quantiles"),
    [
        ("summary_latencies=true", (0.5, 0.9, 0.95, 0.99, 0.999)),
        ("summary_quantiles=0.5:0.05,0.9:0.01", (0.5, 0.9)),
        ('summary_quantiles="0.25"', (0.25,)),
    ],
)
def test_quantiles_are_chosen(entry: str, quantiles: tuple[float, ...]) -> None:
    assert Settings(metrics_config=(entry,)).summary_quantiles() == quantiles


@pytest.mark.parametrize("value", ["", "x", "1.5", "0.5:2", "0.5,,"])
def test_what_is_no_quantile_is_refused(value: str) -> None:
    with pytest.raises(ServingError) as caught:
        from_sources({"metrics_config": (f"summary_quantiles={value}",)}, environment={})
    assert caught.value.message == (
        f"--metrics-config summary_quantiles expects QUANTILE:ERROR,... from 0 to 1, got '{value}'"
    )


@pytest.mark.parametrize("entry", ["latencies=true", "counter_latencies", "counter_latencies=maybe", ""])
def test_metrics_that_there_are_not_cannot_be_switched(entry: str) -> None:
    with pytest.raises(ServingError) as caught:
        from_sources({"metrics_config": (entry,)}, environment={})
    assert caught.value.message == (
        "--metrics-config expects one of counter_latencies=true|false, histogram_latencies=true|false, "
        f"summary_latencies=true|false, summary_quantiles=Q:ERROR,..., got '{entry}'"
    )
