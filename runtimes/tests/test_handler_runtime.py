"""From a handler file to an instance: configurations, loads that fail, what the file sees, and the doors."""

import asyncio
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from penstock import pb
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.runtime import ModelFiles, Placement, find
from penstock.settings import Settings
from penstock.tensor import BYTES, Tensor, objects
from penstock_runtimes.handler import HandlerRuntime

from .handlers import CPU, configuration, ends, failure, opened, send, until, write

ECHO = "import runpod\nrunpod.serverless.start({'handler': lambda job: job['input']})\n"
COUNT = """
    import runpod
    def handler(job):
        yield from range(job["input"])
    runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
"""


# -- configurations


def test_the_backend_handler_is_this_runtime() -> None:
    assert isinstance(find("handler", {}), HandlerRuntime)


def test_a_configuration_is_completed_with_one_text_in_and_one_out(tmp_path: Path) -> None:
    files, runtime = write(tmp_path, ECHO), HandlerRuntime({})
    done = runtime.complete(files, configuration({}), CPU)
    assert list(done.input) == [pb.ModelInput(name="input", data_type=pb.TYPE_STRING, dims=[1])]
    assert list(done.output) == [pb.ModelOutput(name="output", data_type=pb.TYPE_STRING, dims=[1])]
    assert (done.platform, done.max_batch_size, done.model_transaction_policy.decoupled) == ("handler", 0, False)
    runtime.open(files, done, CPU, None).close()


@pytest.mark.parametrize(
    ("definition", "kind"),
    [
        ("def handler(job): yield 1", "generator"),
        ("async def handler(job): yield 1", "async generator"),
        ("import functools\ndef base(x, job): yield 1\nhandler = functools.partial(base, 1)", "generator"),
        ("class Handler:\n    async def __call__(self, job): yield 1\nhandler = Handler()", "async generator"),
        ("async def handler(job): return 1", "async"),
        ("def handler(job): return (number for number in [1])", "plain"),
    ],
)
def test_a_generator_makes_the_model_decoupled(tmp_path: Path, definition: str, kind: str) -> None:
    code = f"import runpod\n{definition}\nrunpod.serverless.start({{'handler': handler}})\n"
    files, runtime = write(tmp_path, code), HandlerRuntime({})
    done = runtime.complete(files, configuration({}), CPU)
    assert done.model_transaction_policy.decoupled == ("generator" in kind)
    assert files.choices["handler"].value == kind
    runtime.open(files, done, CPU, None).close()


def test_what_is_completed_and_never_opened_is_closed(tmp_path: Path) -> None:
    files, runtime = write(tmp_path, "import os\nprint(os.getpid())\n" + ECHO), HandlerRuntime({})
    runtime.complete(files, configuration({}), CPU)
    [kept] = files.kept.values()
    pid = kept._instance.pid
    del kept
    files.kept.clear()
    gc.collect()
    assert ends(pid)


def test_each_instance_has_a_process(tmp_path: Path) -> None:
    files, runtime = write(tmp_path, ECHO), HandlerRuntime({})
    done = runtime.complete(files, configuration({}), CPU)
    one, two = (runtime.open(files, done, CPU, None) for _ in range(2))
    assert one is not two
    for instance in (one, two):
        with pytest.raises(ServingError, match="runs in a process; use start"):
            instance.execute([])
        instance.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (pb.ModelConfig(max_batch_size=4), "a handler takes one job at a time, so max_batch_size must be 0"),
        (
            pb.ModelConfig(input=[pb.ModelInput(name="X", data_type=pb.TYPE_STRING, dims=[1])]),
            r"a handler has one input, 'input' of TYPE_STRING and dims \[ 1 \], a JSON text",
        ),
        (
            pb.ModelConfig(output=[pb.ModelOutput(name="output", data_type=pb.TYPE_FP32, dims=[1])]),
            r"a handler has one output, 'output' of TYPE_STRING and dims \[ 1 \], a JSON text",
        ),
        (pb.ModelConfig(default_model_filename="absent.py"), r"model 'm' has no handler file '.*absent\.py'"),
    ],
)
def test_what_no_handler_can_be_is_refused(tmp_path: Path, config: pb.ModelConfig, message: str) -> None:
    files = write(tmp_path, ECHO)
    config.name, config.backend = "m", "handler"
    config.default_model_filename = config.default_model_filename or "handler.py"
    with pytest.raises(ServingError, match=message) as caught:
        HandlerRuntime({}).complete(files, config, CPU)
    assert caught.value.kind is Kind.INVALID


def test_a_generator_whose_configuration_is_not_completed_must_say_so(tmp_path: Path) -> None:
    files, runtime = write(tmp_path, COUNT), HandlerRuntime({})
    done = runtime.complete(files, configuration({}), CPU)
    files.kept.clear()
    done.ClearField("model_transaction_policy")
    with pytest.raises(ServingError, match=r"is a generator, so model_transaction_policy\.decoupled must be true"):
        runtime.open(files, done, CPU, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"speed": "11"},
            "the handler runtime has no setting 'speed'; there are: python, python_path, start_timeout_s",
        ),
        ({"start_timeout_s": "soon"}, "the handler runtime: parameter 'start_timeout_s' expects a number of seconds"),
        ({"cancel_grace_s": "nan"}, "parameter 'cancel_grace_s' expects a number of seconds, got 'nan'"),
        ({"max_output_bytes": "-1"}, "parameter 'max_output_bytes' expects a whole number, got '-1'"),
        ({"max_output_bytes": "1.5"}, "parameter 'max_output_bytes' expects a whole number, got '1.5'"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ServingError, match=message) as caught:
        HandlerRuntime(settings)
    assert caught.value.kind is Kind.INVALID


def test_a_model_s_parameter_wins_over_the_setting(tmp_path: Path) -> None:
    files = write(tmp_path, ECHO)
    runtime = HandlerRuntime({"max_output_bytes": "10"})
    for parameters, refused in (({}, True), ({"max_output_bytes": "100", "anything": "else"}, False)):
        done = runtime.complete(files, configuration(parameters), CPU)
        instance = files.kept.pop(CPU).take()
        sent = send(instance, "x" * 50)
        [found] = sent.wait("final")
        assert isinstance(found, ServingError) == refused
        instance.close()
        assert done.name == "m"
    with pytest.raises(ServingError, match="model 'm': parameter 'cancel_grace_s' expects"):
        runtime.complete(files, configuration({"cancel_grace_s": "long"}), CPU)


# -- loads that fail


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "failed: SyntaxError: invalid syntax"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("print('hello')", "failed: it ended without calling runpod.serverless.start"),
        ("import sys\nsys.exit(3)", "failed: it called sys.exit(3) instead of runpod.serverless.start"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        (
            "import os, sys\nprint('oh', file=sys.stderr)\nos._exit(5)",
            "ended with exit status 5 before it called runpod.serverless.start; its last words: oh",
        ),
        (
            "import os\nos.kill(os.getpid(), 9)",
            "ended with signal SIGKILL before it called runpod.serverless.start",
        ),
        (
            "import runpod\nrunpod.serverless.start([])",
            "failed: TypeError: runpod.serverless.start expects a dict, got list",
        ),
        (
            "import runpod\nrunpod.serverless.start({'handler': 1})",
            "failed: ValueError: runpod.serverless.start expects a function under the key 'handler'",
        ),
        (
            "import runpod\n@runpod.serverless.register_fitness_check\nasync def f():\n    raise OSError('unfit')\n"
            + ECHO,
            "failed: OSError: unfit",
        ),
    ],
)
def test_a_file_that_does_not_come_to_start_fails_the_load(tmp_path: Path, code: str, message: str) -> None:
    assert failure(tmp_path, code) == f"model 'm': its handler file {message}"


def test_a_load_that_fails_is_logged_with_the_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure(tmp_path, "def load():\n    raise OSError('no weights')\nload()\n")
    assert "line 3, in <module>\n    load()\n" in caplog.text
    assert "OSError: no weights" in caplog.text
    assert "worker.py" not in caplog.text


def test_a_file_that_never_calls_start_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    code = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(1000)\n"
    message = failure(tmp_path, code, start_timeout_s="1.5")
    assert message == "model 'm': its handler file did not call runpod.serverless.start within 1.5 s"
    assert ends(int((tmp_path / "pid").read_text()))


def test_a_module_that_is_missing_beside_requirements_says_how_to_bring_it(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("no_such_module\n")
    message = failure(tmp_path, "import no_such_module")
    assert "pip install --target site -r requirements.txt" in message
    assert "python_path" in message


def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    message = failure(tmp_path, ECHO, python="./absent/python")
    assert f"cannot be started with {tmp_path}/absent/python: [Errno 2]" in message


# -- what the file sees


def test_the_file_runs_as_the_main_program_in_the_model_s_directory(tmp_path: Path) -> None:
    code = """
        import os, pickle, runpod, sys
        import beside
        class Thing:
            pass
        if __name__ == "__main__":
            def handler(job):
                assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
                return {
                    "file": __file__, "main": sys.modules["__main__"].__dict__ is globals(), "argv": sys.argv,
                    "cwd": os.getcwd(), "path": sys.path[0], "beside": beside.value, "spec": __spec__,
                    "config": sorted(config), "own": [key for key in os.environ if key.startswith("PENSTOCK_")],
                    "cuda": os.environ["CUDA_VISIBLE_DEVICES"], "endpoint": os.environ["RUNPOD_ENDPOINT_ID"],
                }
            config = {"handler": handler}
            runpod.serverless.start(config)
    """
    (tmp_path / "1").mkdir()
    (tmp_path / "1/beside.py").write_text("value = 7\n")
    write(tmp_path / "1", code)
    files, runtime = ModelFiles("m", 1, tmp_path, tmp_path / "1"), HandlerRuntime({})
    runtime.complete(files, configuration({}), CPU)
    instance = files.kept.pop(CPU).take()
    file = str(tmp_path / "1/handler.py")
    assert send(instance).result() == {
        "file": file,
        "main": True,
        "argv": [file],
        "cwd": str(tmp_path),
        "path": str(tmp_path / "1"),
        "beside": 7,
        "spec": None,
        "config": ["handler", "reference_counter_start", "rp_args"],
        "own": [],
        "cuda": "",
        "endpoint": "m",
    }
    instance.close()


def test_an_instance_on_a_gpu_sees_that_gpu(tmp_path: Path) -> None:
    code = "import os, runpod\nrunpod.serverless.start({'handler': lambda job: os.environ['CUDA_VISIBLE_DEVICES']})\n"
    files, runtime = write(tmp_path, code), HandlerRuntime({})
    place = Placement("cuda", 3)
    runtime.complete(files, configuration({}), place)
    instance = files.kept.pop(place).take()
    assert (instance.device, send(instance).result()) == ("cuda:3", "3")
    instance.close()


def test_a_model_brings_its_own_packages_and_interpreter(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/brought.py").write_text("value = 11\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(os.path.realpath(sys.executable))
    code = """
        import brought, runpod, sys
        runpod.serverless.start({"handler": lambda job: [brought.value, sys.executable, "numpy" in sys.modules]})
    """
    with opened(tmp_path, code, python_path="site", python="bin/python") as instance:
        assert send(instance).result() == [11, str(tmp_path / "bin/python"), False]


def test_the_runpod_package_is_used_where_there_is_one(tmp_path: Path) -> None:
    package = tmp_path / "site/runpod"
    (package / "serverless/modules").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import serverless\n__version__ = '9.9'\n")
    (package / "serverless/__init__.py").write_text(
        "from .modules.rp_progress import progress_update\nfrom .modules import rp_fitness\n"
        "def start(config):\n    raise SystemExit('the platform')\n"
    )
    (package / "serverless/modules/__init__.py").write_text("")
    (package / "serverless/modules/rp_progress.py").write_text("def progress_update(job, progress):\n    1 / 0\n")
    (package / "serverless/modules/rp_fitness.py").write_text("_fitness_checks = [lambda: print('fit')]\n")
    code = """
        import runpod
        from runpod.serverless.modules.rp_progress import progress_update
        def handler(job):
            progress_update(job, 1)
            runpod.serverless.progress_update(job, 2)
            raise ValueError(runpod.__version__)
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code, python_path="site") as instance:
        sent = send(instance)
        assert '"error_message": "9.9"' in sent.error().message
        assert '"runpod_version": "9.9"' in sent.error().message
        assert sent.of("progress") == [1, 2]


# -- through the engine


def text(value: str) -> dict[str, Tensor]:
    return {"input": Tensor("input", BYTES, objects([value.encode()], (1,)))}


def test_a_folder_with_a_handler_file_is_served(tmp_path: Path) -> None:
    write(tmp_path / "echo", ECHO, "rp_handler.py")
    write(tmp_path / "count", COUNT)

    async def run() -> None:
        engine = Engine(Settings(model_repository=(str(tmp_path),), device="cpu"))
        await asyncio.to_thread(engine.lifecycle.start)
        try:
            assert engine.lifecycle.failures() == {}
            echo, count = engine.model("echo"), engine.model("count")
            assert (echo.decoupled, count.decoupled) == (False, True)
            request = InferRequest("echo", "", "r", text('{"a": 1}'), {})
            answer = await engine.infer(echo, request)
            assert (answer.version, answer.outputs[0].array.tolist()) == ("1", [b'{"a": 1}'])
            seen: list[tuple[Any, bool]] = []
            async for replied in engine.stream(count, InferRequest("count", "", "r", text("100"), {})):
                seen.append((replied.response.outputs[0].array[0], replied.final))  # noqa: PERF401
            assert seen[:-1] == [(str(number).encode(), False) for number in range(100)]
            assert seen[-1][1]
            assert seen[-1][0].startswith(b"[0,1,2,")
            endless = InferRequest("count", "", "r", text("1000000000"), {})
            stream = engine.stream(count, endless)
            await anext(stream)
            await stream.aclose()
            short = InferRequest("count", "", "r", text("1"), {})
            assert [replied.final async for replied in engine.stream(count, short)] == [False, True]
        finally:
            assert await asyncio.to_thread(engine.lifecycle.stop, 20.0)

    asyncio.run(run())


def test_a_model_whose_file_fails_is_unavailable_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "bad", "import no_such_module\n")
    engine = Engine(Settings(model_repository=(str(tmp_path / "bad/handler.py"),), device="cpu"))
    engine.lifecycle.start()
    assert "No module named 'no_such_module'" in engine.lifecycle.failures()["bad"]
    engine.lifecycle.stop(20.0)


def test_unloading_a_handler_ends_its_process(tmp_path: Path) -> None:
    write(tmp_path / "m", "import os\nopen('pid', 'w').write(str(os.getpid()))\n" + ECHO)
    engine = Engine(Settings(model_repository=(str(tmp_path / "m"),), device="cpu"))
    engine.lifecycle.start()
    pid = int((tmp_path / "m/pid").read_text())
    engine.lifecycle.unload("m")
    until(lambda: not engine.lifecycle.models())
    assert ends(pid)
    engine.lifecycle.stop(20.0)
