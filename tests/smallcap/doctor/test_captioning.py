"""The proofs on the demo's model: a sound device passes them, and each notices its own fault."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from smallcap.captioned import CaptionResult
from smallcap.captioner import Captioner
from smallcap.doctor import captioning
from smallcap.doctor.captioning import Effort, prove_captioning
from smallcap.doctor.report import Finding
from smallcap.index.gpu_search import ExactBlocks
from tests.pretended_cuda.torch_cuda import pretended_cuda

LITTLE = Effort(images=5, batches=4, largest_batch=3)


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    """The worst status of each subject."""
    worst: dict[str, str] = {}
    for finding in findings:
        worst[finding.subject] = max(
            worst.get(finding.subject, ""), finding.status, key=["", "ok", "warn", "fail"].index
        )
    return worst


SOUND = {"batch of one": "ok", "recorded steps": "ok", "random batches": "ok"}


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is a measurement, which a busy machine can change."""
    monkeypatch.setattr(captioning, "resolve_dtype", lambda dtype, device: "bfloat16")


def test_a_sound_device() -> None:
    assert statuses(prove_captioning("cpu", LITTLE)) == SOUND | {"precision": "ok"}


def test_a_large_batch_that_captions_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    caption_batch = Captioner.caption_batch

    def shifted(self: Captioner, pixels: Sequence[Any], *rest: Any) -> list[CaptionResult]:
        results = caption_batch(self, pixels, *rest)
        return results[1:] + results[:1]

    monkeypatch.setattr(Captioner, "caption_batch", shifted)
    findings = {finding.subject: finding for finding in prove_captioning("cpu", LITTLE)}
    assert findings["batch of one"].status == "fail"
    assert "--device cpu" not in findings["batch of one"].remedy  # it is the CPU that captions otherwise


def test_a_recording_that_does_not_undo_its_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Any, run: Any, undo: Any) -> Any:
        run()
        return run

    monkeypatch.setattr(captioning._Runs, "record", record)
    assert statuses(prove_captioning("cpu", LITTLE))["recorded steps"] == "fail"


def test_a_pipeline_that_loses_an_image_and_one_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    caption_batches = Captioner.caption_batches

    def losing(self: Captioner, batches: Any) -> Iterator[list[CaptionResult]]:
        first, *others = caption_batches(self, batches)
        yield first[:-1]
        yield from others

    monkeypatch.setattr(Captioner, "caption_batches", losing)
    assert statuses(prove_captioning("cpu", LITTLE)) == SOUND | {"random batches": "fail", "precision": "ok"}
    monkeypatch.setattr(Captioner, "caption_batches", lambda self, batches: 1 / 0)
    findings = list(prove_captioning("cpu", LITTLE))
    assert statuses(findings) == SOUND | {"random batches": "fail", "precision": "ok"}
    assert any("ZeroDivisionError" in finding.found for finding in findings)


def test_memory_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([1 << 30, 2 << 30])
    monkeypatch.setattr(captioning, "_memory", lambda device: next(sizes))
    findings = [finding for finding in prove_captioning("cpu", LITTLE) if finding.subject == "random batches"]
    assert [finding.status for finding in findings] == ["ok", "fail"]
    assert "memory grows: the process holds 2.1 GB after them, 1.1 GB half-way" in findings[1].found


@pytest.mark.parametrize(("logprob", "status"), [(-3.0, "fail"), (float("nan"), "fail")])
def test_a_precision_that_loses_too_much(logprob: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caption_batch = Captioner.caption_batch

    def rounded(self: Captioner, pixels: Sequence[Any], *rest: Any) -> list[CaptionResult]:
        results = caption_batch(self, pixels, *rest)
        is_float32 = str(self.model.dtype) == "torch.float32"
        return results if is_float32 else [replace(result, logprob=logprob * 99) for result in results]

    monkeypatch.setattr(Captioner, "caption_batch", rounded)
    assert statuses(prove_captioning("cpu", LITTLE)) == SOUND | {"precision": status}


@pytest.mark.slow
def test_a_gpu_is_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    least = Effort(images=2, batches=2, largest_batch=2)
    candidates = ExactBlocks.candidates
    with pretended_cuda():
        assert statuses(prove_captioning("cuda", least)) == {"gpu against cpu": "ok"} | SOUND | {"precision": "ok"}
        monkeypatch.setattr(ExactBlocks, "candidates", lambda self, queries, count: candidates(self, -queries, count))
        findings = [finding for finding in prove_captioning("cuda", least) if finding.subject == "gpu against cpu"]
        assert findings[-1].status == "fail"
        assert "--device cpu" in findings[-1].remedy
