"""The command line: quick help, flags that stand alone, and refusals that say what was meant."""

import subprocess
import sys

import pytest
from penstock import __version__
from penstock.cli import BLAS_THREADS, main, one_blas_thread
from penstock.settings import OPTIONS
from penstock.triton_flags import FLAGS

HEAVY = ("numpy", "onnxruntime", "google.protobuf", "grpc", "uvicorn", "starlette", "asyncio")
RARELY = ("grpc", "hpack", "asyncpg", "redis", "onnxruntime", "tomllib", "penstock.client", "penstock.bench")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a command line that is not understood."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What argparse says, below its usage line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_help_loads_nothing_that_takes_long() -> None:
    script = (
        "import sys, penstock.cli\n"
        "try: penstock.cli.main(['serve', '--help'])\n"
        f"except SystemExit: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--http-port" in done.stdout


def test_serving_loads_neither_transport_of_grpc_before_one_is_chosen() -> None:
    script = f"import sys, penstock.cli, penstock.serve; print([name for name in {RARELY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_runtime_of_the_server_is_found_without_the_metadata_of_all_that_is_installed() -> None:
    script = "import sys, penstock.runtime as r; r.find('ensemble', {}); print('importlib.metadata' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("given", "meanwhile"), [({}, "1"), ({BLAS_THREADS: "4"}, "4")])
def test_numpys_blas_gets_one_thread_unless_the_environment_says_otherwise(
    given: dict[str, str], meanwhile: str
) -> None:
    environment = dict(given)
    with one_blas_thread(environment):
        assert environment == {BLAS_THREADS: meanwhile}
    assert environment == given


def test_the_help_of_serve_has_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in OPTIONS.values():
        assert f"{option.flag} " in text
        assert " ".join(option.help.split()[:4]) in text
    assert "HTTP port; 0 takes a free one (default: 8000)" in text


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "serve models over HTTP and gRPC" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"penstock {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--http-prt", "80"], "penstock: unknown flag --http-prt; did you mean --http-port?\n"),
        (["--http-prt=80"], "penstock: unknown flag --http-prt; did you mean --http-port?\n"),
        (["--qqqqqqqq"], "penstock: unknown flag --qqqqqqqq\n"),
        (["--http-por", "80"], "penstock: unknown flag --http-por; did you mean --http-port?\n"),
        (["--model-stor", "x"], "penstock: unknown flag --model-stor; did you mean --model-repository?\n"),
        (["models", "--grpc-prt", "1"], "penstock: unknown flag --grpc-prt; did you mean --grpc-port?\n"),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert refused(capsys, "serve", *arguments) == message


@pytest.mark.parametrize("name", [flag.name for flag in FLAGS.values() if flag.penstock is None])
def test_a_flag_of_tritons_that_is_not_here_is_refused_by_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    flag = FLAGS[name]
    state = "does not have yet" if flag.planned else "does not have"
    for arguments in ([f"--{name}=1"], [f"--{name}", "1"]):
        assert refused(capsys, "serve", *arguments) == (
            f"penstock: --{name} is a flag of Triton's that Penstock {state}: {flag.note}\n"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--http-port", "eighty"], "--http-port expects a whole number, got 'eighty'"),
        (["--allow-http=maybe"], "--allow-http expects true or false, got 'maybe'"),
        (["--device", "tpu"], "--device expects one of auto, cpu, cuda, got 'tpu'"),
        (["--http-port"], "expected one argument"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in usage_error(capsys, "serve", *arguments)


# What follows a switch shows whether the switch took it for its value: --http-port 99999 is refused once it is read.
@pytest.mark.parametrize(
    "switch",
    [
        ["--strict-readiness"], ["--strict-readiness", "false"], ["--strict-readiness=0"], ["--log-verbose"],
        ["--log-verbose", "2"], ["--log-verbose=true"], ["--log-verbose", "false"], ["--allow-grpc", "OFF"],
    ],
)  # fmt: skip
def test_a_switch_may_stand_alone_or_have_a_value(capsys: pytest.CaptureFixture[str], switch: list[str]) -> None:
    assert refused(capsys, "serve", *switch, "--http-port", "99999") == (
        "penstock serve: --http-port expects a port from 0 to 65535, got 99999\n"
    )


def test_a_number_that_is_no_switch_needs_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--http-port expects a whole number, got 'true'" in usage_error(capsys, "serve", "--http-port", "true")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load-model", "a"], "--load-model needs --model-control-mode explicit"),
        (["--model-control-mode", "explicit", "--load-model", "a", "--load-model", "*"],
         "Wildcard model name '*' must be the ONLY startup model if specified at all."),
        (["--config", "/nowhere.toml"], "cannot read settings from '/nowhere.toml': "),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert refused(capsys, "serve", *arguments).startswith(f"penstock serve: {message}")


def test_an_unknown_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'serv'" in usage_error(capsys, "serv")
