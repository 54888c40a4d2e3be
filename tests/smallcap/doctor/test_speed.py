"""What `measure` reports; `measure_captioner` and `build_captioner`, which it calls, have tests of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_models import TINY_DIM
from smallcap.benchmark.random_content import write_index
from smallcap.benchmark.stages import BenchmarkResult, StageResult
from smallcap.captioner import Captioner
from smallcap.doctor import speed
from smallcap.doctor.speed import measure
from smallcap.index.retriever import Retriever
from smallcap.model.clip_encoder import load_retrieval_encoder
from tests.index_files import unit_vectors
from tests.pretended_cuda.torch_cuda import pretended_cuda


@pytest.fixture(autouse=True)
def small_sizes(tiny_smallcap: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny captioner, and a benchmark that has run already."""
    encoder = load_retrieval_encoder(f"hf:{tiny_clip}")

    def build(options: Any, dtype: str, folder: Path) -> Captioner:
        texts = [f"caption {number}" for number in range(9)]
        retriever = Retriever(write_index(folder, unit_vectors(9, TINY_DIM), texts, encoder.identity), folder)
        return Captioner.from_pretrained(str(tiny_smallcap), retriever, device=options.device, dtype=dtype)

    stages = (StageResult("vision encoder", 1234.5), StageResult("search", 71.25))
    result = BenchmarkResult(7.5, 6, 1, 0.5, 0.5, 1, stages, 60, 10, 0, {}, {"dtype": "float32"})
    monkeypatch.setattr(speed, "build_captioner", build)
    monkeypatch.setattr(speed, "measure_captioner", lambda captioner, options, make_loop: result)


def test_memory_and_rates() -> None:
    memory, stages, loop = measure("cpu")
    assert [finding.status for finding in (memory, stages, loop)] == ["ok", "ok", "ok"]
    assert memory.found.startswith("4 images took ")
    assert stages.found == "images/s in float32, each stage alone; vision encoder: 1,234; search: 71.2"
    assert loop.found == "all from crops to captions: 7.5 images/s"


def test_a_batch_that_takes_more_than_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    caption_batch = Captioner.caption_batch

    def wasteful(self: Captioner, pixels: Any) -> Any:
        torch.ones(1 << 28)  # 1 GiB
        return caption_batch(self, pixels)

    monkeypatch.setattr(Captioner, "caption_batch", wasteful)
    memory, *_ = measure("cpu")
    assert (memory.status, memory.remedy) == ("warn", "Give --batch-size 2 or less.")
    assert memory.found.startswith("4 images took 1,")


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed._SIZES, "cuda", speed._SIZES["cpu"])
    with pretended_cuda():
        memory, *_ = measure("cuda")
    assert (
        memory.status != "fail"
    )  # how much it is means nothing: what is recorded there keeps all intermediate tensors
    assert "; such batches begin at" in memory.found


def test_a_system_that_does_not_say_what_a_batch_took(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if str(path).startswith("/proc"):
            raise PermissionError
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    memory, *_ = measure("cpu")
    assert memory.status == "ok"
    assert memory.found.startswith("this system does not say what 4 images took; such batches begin at ")
