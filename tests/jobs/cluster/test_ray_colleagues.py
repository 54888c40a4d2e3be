import time

import pytest

from jobs.cluster.ray_colleagues import RayColleagues, ray_colleagues
from smallcap.patience import patience_s, set_patience
from smallcap.storage_faults import this_node

pytestmark = pytest.mark.ray


def _ask_and_tell() -> tuple[float, str | None]:
    import jobs.cluster.side_actor  # noqa: F401 - as whatever a worker is sent imports of that package
    from smallcap.colleagues import colleagues

    colleagues().share("from a worker", "value")
    colleagues().tell("s3://bucket", "Storage does not answer.")
    return patience_s(), colleagues().recall("from the driver")


def test_workers_know_what_the_driver_set_and_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    mine = ray_colleagues()
    set_patience(17)
    with mine.hear():
        mine.share("from the driver", "x")
        asked = ray.get([ray.remote(_ask_and_tell).remote() for _ in range(3)])
        assert asked == [(17, "x")] * 3
        assert mine.recall("from a worker") == "value"
        deadline = time.monotonic() + 20
        while "does not answer" not in (told := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.2)
    set_patience(None)
    assert told.count("Storage does not answer.") == 1, f"once of {this_node()}"
    assert RayColleagues().recall("from a worker") is None  # nothing of an ended job stays with Ray's head
