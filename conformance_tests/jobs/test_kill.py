"""The kill test, in small; `python -m conformance_tests.jobs.kill` is the long one."""

from pathlib import Path

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.jobs.kill import PLAIN, Seen, Trial

pytestmark = pytest.mark.over("http")


@pytest.fixture
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Trial:
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    return Trial(tmp_path, seed=1)


@clause("jobs.recovery")
def test_kills_lose_nothing_and_nothing_ends_twice(trial: Trial) -> None:
    assert trial.run(kills=10) == []
    counts = trial.ledger.counts
    assert counts["accepted"] > 50
    assert counts["run again after a kill"] > 0
    assert counts["webhooks due"] > 0


@clause("jobs.recovery")
def test_a_lost_job_would_be_told(trial: Trial) -> None:
    trial.ledger.accepted("nobodys-job", Seen(PLAIN, "nobodys"))
    assert [problem.partition(" Seen")[0] for problem in trial.run(kills=0)] == ["lost: nobodys-job"]
