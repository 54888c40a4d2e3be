"""The whole captioner on the pretended device: the CPU's captions, few waits for each batch, and lasting threads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from smallcap import captioner as captioner_module
from smallcap.captioner import Captioner, CaptionResult
from smallcap.captioner_setup import CaptionerOptions
from smallcap.errors import RunError
from smallcap.images.crops import Pixels
from smallcap.model import checkpoint
from smallcap.model.prompt import load_tokenizer
from tests.caption_runs import jpeg
from tests.pretended_cuda.checks import Mutation, check_waits, mutated
from tests.pretended_cuda.conftest import MakeCaptioner
from tests.pretended_cuda.torch_cuda import pretended_cuda

Batch = tuple[list[Pixels], list[str | None] | None]

WAYS: dict[str, dict[str, Any]] = {
    "beams": {},
    "greedy, without retrieval": {"num_beams": 1, "k": 0},
    "several captions": {"num_captions": 2, "no_repeat_ngram_size": 2},
    # Cold: among 50,257 tokens that are all as likely, the last digit of a logit decides.
    "sampling": {"do_sample": True, "num_captions": 2, "temperature": 0.1, "seed": 3},
}
# How often the host may wait in each file while one batch is captioned, and why it must.
WAITS = {
    "smallcap/captioner.py": (2, "the images' embeddings come back; the next batch is prepared on another stream"),
    "smallcap/machine/side_thread.py": (1, "the next batch is prepared on another stream"),
    "smallcap/index/gpu_search.py": (6, "queries are uploaded, nearest rows come back; so do they for exact scores"),
    "smallcap/model/clip_encoder.py": (
        7,
        "mean and deviation are uploaded, and captions with their mask, at which transformers looks twice; "
        "the captions' vectors come back",
    ),
    "smallcap/decoding/engine.py": (21, "see tests/pretended_cuda/test_decoding.py"),
}


def batches_for(captioner: Captioner, sizes: Sequence[int]) -> list[Batch]:
    """Returns batches of different images, some of which must not retrieve their own captions."""
    numbers = iter(range(sum(sizes)))
    batches: list[Batch] = []
    for size in sizes:
        pixels = [captioner.crop_plan.crop(jpeg(next(numbers))) for _ in range(size)]
        batches.append((pixels, None if len(batches) % 2 else [f"{number}.jpg" for number in range(size)]))
    return batches


def caption(captioner: Captioner, batches: Sequence[Batch]) -> list[CaptionResult]:
    return [result for results in captioner.caption_batches(batches) for result in results]


def comparable(results: Sequence[CaptionResult]) -> list[Any]:
    """Returns everything but the numbers that rounding may change."""
    return [
        (r.caption, [a.caption for a in r.alternatives], [n.caption_id for n in r.neighbours], r.num_tokens, r.width)
        for r in results
    ]


def check_same(
    found: Sequence[CaptionResult], expected: Sequence[CaptionResult], retrieves: bool, tolerance: float = 1e-5
) -> None:
    """Everything is the same, but for what rounding may do to log probabilities and, in cosines, up to `tolerance`."""
    assert comparable(found) == comparable(expected)
    for result, expected_result in zip(found, expected, strict=True):
        assert result.logprob == pytest.approx(expected_result.logprob, abs=1e-3)
        if retrieves:
            assert result.clip_score == pytest.approx(expected_result.clip_score, abs=tolerance)
            assert result.embedding == pytest.approx(expected_result.embedding, abs=tolerance)


@pytest.mark.parametrize(
    ("encoder_spec", "way"),
    [*(("hf", way) for way in WAYS), ("open_clip ViT", "beams"), ("open_clip ResNet", "beams")],
    indirect=["encoder_spec"],
)
def test_captions_are_the_cpus(make_captioner: MakeCaptioner, encoder_spec: str, way: str) -> None:
    on_cpu = make_captioner("cpu", **WAYS[way], max_new_tokens=5)
    batches = batches_for(on_cpu, sizes=(4, 0, 3, 1))
    expected = caption(on_cpu, batches)
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda", **WAYS[way], max_new_tokens=5)
        found = [caption(captioner, batches) for _ in range(2)]
        if captioner.retriever is not None:
            assert captioner.retriever.search_backend == "gpu-exact"
            assert captioner.shares_encoder == encoder_spec.startswith("hf:")
        assert cuda.captures
    for results in found:
        check_same(results, expected, bool(captioner.k))


def test_the_host_waits_where_it_must(make_captioner: MakeCaptioner) -> None:
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda")
        batches = batches_for(captioner, sizes=(4, 4, 4))
        caption(captioner, batches)
        cuda.clear_events()
        caption(captioner, batches)
        check_waits(cuda, WAITS, len(batches), place_of=lambda event: event.file)
        assert any(event.kind == "upload later" for event in cuda.events), "crops do not come from pinned memory"


def check_threads(make_captioner: MakeCaptioner, mutation: Mutation | None = None) -> None:
    """However often it is called, the same two threads use the device: cuDNN's plans belong to a thread."""
    with mutated(mutation) as cuda:
        captioner = make_captioner("cuda")
        for batches in [batches_for(captioner, sizes=(2, 2))] * 3:
            caption(captioner, batches)
        assert len(cuda.threads) == 2, f"threads used the device: {sorted(thread.name for thread in cuda.threads)}"


def test_the_threads_last(make_captioner: MakeCaptioner) -> None:
    check_threads(make_captioner)


def caption_in_a_new_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    caption_batches = Captioner.caption_batches

    def mutant(captioner: Captioner, batches: Sequence[Batch]) -> Iterator[list[CaptionResult]]:
        with ThreadPoolExecutor(1, "anew") as thread:
            return iter(thread.submit(lambda: list(caption_batches(captioner, batches))).result())

    monkeypatch.setattr(Captioner, "caption_batches", mutant)


def test_a_thread_for_each_call_is_noticed(make_captioner: MakeCaptioner) -> None:
    with pytest.raises(AssertionError, match="anew"):
        check_threads(make_captioner, caption_in_a_new_thread)


def test_encoders_meet_few_shapes(make_captioner: MakeCaptioner) -> None:
    """Batches of any size have a power of two rows: a GPU plans attention and convolutions anew for each shape."""
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda", num_beams=1)
        caption(captioner, batches_for(captioner, sizes=(1, 2, 3, 4, 5, 6, 7)))
        rows = {query[0] for query, *_ in cuda.attention_shapes}
    assert rows == {1, 2, 4, 8}


@pytest.mark.parametrize("encoder_spec", ["hf", "open_clip ViT"], indirect=True)
def test_nothing_is_read_before_another_stream_has_written_it(make_captioner: MakeCaptioner, encoder_spec: str) -> None:
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda")
        caption(captioner, batches_for(captioner, sizes=(2, 3, 1)))
        assert not cuda.hazards, f"{[*map(str, cuda.hazards)]}"


def test_the_next_batch_is_prepared_on_another_stream(make_captioner: MakeCaptioner) -> None:
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda")
        caption(captioner, batches_for(captioner, sizes=(2, 2)))
        (here,) = [streams for thread, streams in cuda.threads.items() if thread is threading.current_thread()]
        (beside,) = [streams for thread, streams in cuda.threads.items() if thread is not threading.current_thread()]
    assert not here & beside


# --- the second GPU


def check_second_gpu(make_captioner: MakeCaptioner, mutation: Mutation | None = None) -> None:
    """On the second GPU the captions are the CPU's, and the process has nothing on the first one."""
    on_cpu = make_captioner("cpu", max_new_tokens=5)
    batches = batches_for(on_cpu, sizes=(3, 2))
    expected = comparable(caption(on_cpu, batches))
    with mutated(mutation, cards=2) as cuda:
        captioner = make_captioner("cuda:1", max_new_tokens=5)
        assert captioner.retriever.search_backend == "gpu-exact"
        alone = [result for batch in batches for result in captioner.caption_batch(*batch)]
        assert comparable(alone) == comparable(caption(captioner, batches)) == expected
        assert cuda.captures and not cuda.hazards
        assert cuda.cards_used == {1}, f"GPUs that were used: {cuda.cards_used}"
        assert torch.cuda.current_device() == 0  # as the caller had it


def test_a_captioner_on_the_second_gpu_leaves_the_first_alone(make_captioner: MakeCaptioner) -> None:
    check_second_gpu(make_captioner)


@pytest.mark.parametrize(
    ("module", "message"),
    [(checkpoint, "Inside a capture on cuda:0"), (captioner_module, "GPUs that were used")],
    ids=["decoding", "preparing"],
)
def test_work_on_another_gpu_than_the_current_one_is_noticed(
    module: Any, message: str, make_captioner: MakeCaptioner
) -> None:
    def leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "on_device", lambda device: nullcontext())

    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_second_gpu(make_captioner, leave_out)


# --- kernels


def test_attention_has_no_plans_for_shapes_and_float32_is_exact_wherever_a_model_was_loaded(
    tiny_smallcap: Path,
) -> None:
    source = str(tiny_smallcap)
    with pretended_cuda():
        model = checkpoint.load_checkpoint(source)
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.allow_tf32
        tokenizer = load_tokenizer(checkpoint.tokenizer_source(source))
        Captioner(model.to("cuda"), tokenizer, options=CaptionerOptions(k=0))
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32


# --- memory that runs out beside the decoder

MIB = 1 << 20
STEPS: dict[str, Callable[[Captioner], tuple[Any, str]]] = {
    "the encoders or the search: encode": lambda captioner: (captioner, "encode"),
    "the encoders or the search: embed": lambda captioner: (captioner, "embed"),
    "the encoders or the search: retrieve": lambda captioner: (captioner, "retrieve"),
    "the text encoder": lambda captioner: (captioner.retrieval_encoder, "encode_texts"),
}


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest) -> str:
    return request.param


def take_memory(captioner: Captioner, step: str, image_bytes: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a step take so much memory for each image; returns a list of the sizes that it is tried with."""
    owner, name = STEPS[step](captioner)
    run, sizes = getattr(owner, name), list[int]()

    def hungry(rows: Any, *rest: Any) -> Any:
        sizes.append(len(rows))
        taken = torch.empty(len(rows) * image_bytes, dtype=torch.uint8, device="cuda")
        result = run(rows, *rest)
        del taken
        return result

    monkeypatch.setattr(owner, name, hungry)
    return sizes


def test_each_step_goes_on_in_halves_where_memory_runs_out(
    make_captioner: MakeCaptioner, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = make_captioner("cpu", num_beams=1, max_new_tokens=3)
    batches = batches_for(on_cpu, sizes=(6, 3))
    expected = comparable(caption(on_cpu, batches))
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda", num_beams=1, max_new_tokens=3)
        sizes = take_memory(captioner, step, 16 * MIB, monkeypatch)
        freed: list[bool] = []
        free = captioner.model.free_memory
        monkeypatch.setattr(
            captioner.model, "free_memory", lambda: (freed.append(captioner._generating._is_owned()), free())
        )
        cuda.order.total_bytes = cuda.order.allocated_bytes + 60 * MIB
        assert comparable(caption(captioner, batches)) == expected
        assert sizes[:3] == [6, 4, 2]
        assert sorted(sizes[3:]) == [1, 2, 2, 2]  # later batches are cut at once
        assert freed == [True, True]  # never beside a generation of another thread
        assert comparable([result for batch in batches for result in captioner.caption_batch(*batch)]) == expected
        assert max(sizes[3:]) == 2
        assert not cuda.hazards


def test_one_image_for_which_memory_does_not_suffice_ends_with_a_remedy(
    make_captioner: MakeCaptioner, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_cuda() as cuda:
        captioner = make_captioner("cuda", num_beams=1, max_new_tokens=3)
        (batch,) = batches_for(captioner, sizes=(3,))
        sizes = take_memory(captioner, step, 80 * MIB, monkeypatch)
        cuda.order.total_bytes = cuda.order.allocated_bytes + 60 * MIB
        for captioned in (lambda: caption(captioner, [batch]), lambda: captioner.caption_batch(*batch)):
            with pytest.raises(RunError, match="does not suffice for one image") as raised:
                captioned()
            assert raised.value.where.startswith(step.partition(":")[0])
            assert "CUDA out of memory" in raised.value.found
            assert "gpus_per_actor" in raised.value.remedy
        assert sizes == [3, 2, 1, 1, 1, 1]  # the last try comes after memory was freed
