import pytest

from smallcap.model.checkpoint import SmallCapModel, load_checkpoint
from tests.oracles import ORACLE


@pytest.fixture(scope="module")
def model() -> SmallCapModel:
    return load_checkpoint(str(ORACLE / "gpt2_r4"))
