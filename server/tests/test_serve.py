"""What `penstock serve` prints at its start."""

from pathlib import Path

import pytest
from penstock.serve import suggestion

from .fakes import EchoInstance
from .fakes_job_door import House, echo, handler, run

URL = "http://localhost:8000"


def test_a_model_whose_inputs_can_be_made_up_is_suggested_before_a_handler(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        text = suggestion(made.engine.lifecycle.models(), URL, jobs=True, keyed=False)
        assert text.startswith(f"Try it:\n  curl -s {URL}/v2/models/m/infer -d ")

    run(tmp_path, test, {"h": handler(echo), "m": EchoInstance})


def test_where_there_are_only_handlers_a_job_is_suggested_whose_input_is_left_open(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        text = suggestion(made.engine.lifecycle.models(), URL, jobs=True, keyed=False)
        assert text == (
            "Try it, with the input that its handler takes in place of {}:\n"
            f"""  curl -s {URL}/v2/h/runsync -d '{{"input": {{}}}}'"""
        )

    run(tmp_path, test, {"h": handler(echo)})


@pytest.mark.parametrize(("name", "jobs"), [("h", False), ("metrics", True)])
def test_a_handler_without_a_job_door_is_suggested_over_the_inference_protocol(
    tmp_path: Path, name: str, jobs: bool
) -> None:
    async def test(made: House) -> None:
        text = suggestion(made.engine.lifecycle.models(), URL, jobs, keyed=True)
        assert f'curl -s -H "Authorization: Bearer $KEY" {URL}/v2/models/{name}/infer -d ' in text
        assert '"data":["{}"]' in text

    run(tmp_path, test, {name: handler(echo)})
