"""Every flag of Triton's is known: done, planned or refused, and none is accepted and ignored."""

import pytest
from penstock.settings import OPTIONS
from penstock.triton_flags import FLAGS, Flag, markdown

NAMES = """
    id exit-timeout-secs log-verbose log-info log-warning log-error log-format log-file model-repository model-store
    exit-on-error disable-auto-complete-config strict-model-config strict-readiness model-control-mode
    repository-poll-secs load-model model-config-name model-load-thread-count model-load-retry-count model-namespacing
    model-load-gpu-limit allow-http http-address http-port http-thread-count reuse-http-port http-max-input-size
    http-header-forward-pattern http-restricted-api allow-grpc grpc-address grpc-port reuse-grpc-port
    grpc-infer-thread-count grpc-infer-allocation-pool-size grpc-max-response-pool-size
    grpc-infer-response-compression-level grpc-header-forward-pattern grpc-restricted-protocol grpc-use-ssl
    grpc-use-ssl-mutual grpc-server-cert grpc-server-key grpc-root-cert grpc-keepalive-time grpc-keepalive-timeout
    grpc-keepalive-permit-without-calls grpc-http2-max-pings-without-data
    grpc-http2-min-recv-ping-interval-without-data grpc-http2-max-ping-strikes grpc-max-connection-age
    grpc-max-connection-age-grace allow-metrics metrics-address metrics-port allow-gpu-metrics allow-cpu-metrics
    metrics-interval-ms metrics-config trace-config trace-file trace-level trace-rate trace-count trace-log-frequency
    cache-config cache-directory response-cache-byte-size rate-limit rate-limit-resource pinned-memory-pool-byte-size
    cuda-memory-pool-byte-size cuda-virtual-address-size min-supported-compute-capability buffer-manager-thread-count
    host-policy enable-peer-access backend-directory backend-config repoagent-directory allow-client-shm
    allow-sagemaker allow-vertex-ai
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_flag_of_tritons_is_in_the_table(name: str) -> None:
    assert name in FLAGS


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if flag.penstock], ids=lambda flag: flag.name)
def test_a_flag_that_is_done_is_an_option_here(flag: Flag) -> None:
    known = {name for option in OPTIONS.values() for name in (option.name, *option.aliases)}
    assert flag.penstock is not None
    assert flag.penstock.replace("-", "_") in known


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if not flag.penstock], ids=lambda flag: flag.name)
def test_a_flag_that_is_not_done_is_no_option_and_says_why(flag: Flag) -> None:
    assert flag.note
    assert flag.name.replace("-", "_") not in OPTIONS


def test_the_table_in_the_documentation_has_every_flag_and_every_option_once() -> None:
    lines = markdown().splitlines()
    named = [line.split("`")[1].removeprefix("--") for line in lines if line.startswith("| `--")]
    own = [option.flag.removeprefix("--") for option in OPTIONS.values() if option.flag[2:] not in FLAGS]
    assert named == [*FLAGS, *own]
    assert "| `--http-port` | done |  |" in lines
    assert any(line.startswith("| `--trace-rate` | planned | ") for line in lines)
    assert any(line.startswith("| `--host-policy` | refused at start | ") for line in lines)
