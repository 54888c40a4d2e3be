"""What the tests beside this one compare on the pretended GPU, on a real one, where there is one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from smallcap.decoding.strategy import GenerationOptions
from tests.in_process_ray import NODE
from tests.oracles import ORACLES, expected_of, hidden_states_of
from tests.pretended_cuda.conftest import MakeCaptioner
from tests.pretended_cuda.test_captioner import WAYS, batches_for, caption, check_same, comparable
from tests.pretended_cuda.test_decoding import WAYS as DECODING_WAYS
from tests.pretended_cuda.test_decoding import captions_on_the_cpu, generate, load_model
from tests.pretended_cuda.test_jobs import SETTINGS, build_index, check_rows, rows_on
from tests.pretended_cuda.test_training import train, trainer_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(("name", "num_beams"), [("greedy", 1), ("beam3", 3), ("beam5", 5)])
@pytest.mark.parametrize("oracle", ORACLES)
def test_tokens_are_the_references(oracle: str, name: str, num_beams: int) -> None:
    expected = expected_of(oracle)
    model = load_model(oracle).to("cuda")
    options = GenerationOptions(num_beams, max_new_tokens=25, length_penalty=0.0, eos_token_id=13, pad_token_id=0)
    for _ in range(2):  # the second time replays what the first has recorded
        found = model.generate(hidden_states_of(oracle).to("cuda"), expected["prompts"], options)
        assert [best.token_ids for best, *_ in found] == [case[name] for case in expected["cases"]]


@pytest.mark.parametrize("way", DECODING_WAYS)
@pytest.mark.parametrize("oracle", ["gpt2_r4", "opt_r4", "xglm_r2"])
def test_captions_are_the_cpus(oracle: str, way: str) -> None:
    model = load_model(oracle).to("cuda")
    for rows in (range(5), range(3, 8)):
        found, expected = generate(model, oracle, rows, way), captions_on_the_cpu(oracle, way, rows)
        assert [[c.token_ids for c in captions] for captions in found] == [
            [c.token_ids for c in captions] for captions in expected
        ]


@pytest.mark.parametrize(
    ("encoder_spec", "way"),
    [
        # Not sampling: where 50,257 tokens are about as likely, rounding decides.
        *(("hf", way) for way in WAYS if way != "sampling"),
        ("open_clip ViT", "beams"),
        ("open_clip ResNet", "beams"),
    ],
    indirect=["encoder_spec"],
)
def test_the_whole_captioner_gives_the_cpus_captions(make_captioner: MakeCaptioner, way: str) -> None:
    on_cpu = make_captioner("cpu", **WAYS[way], max_new_tokens=5)
    batches = batches_for(on_cpu, sizes=(4, 0, 3, 1))
    expected = caption(on_cpu, batches)
    captioner = make_captioner("cuda", **WAYS[way], max_new_tokens=5)
    for _ in range(2):
        check_same(caption(captioner, batches), expected, bool(captioner.k), tolerance=1e-4)


def test_batches_go_on_in_halves_where_memory_runs_out(make_captioner: MakeCaptioner) -> None:
    captioner = make_captioner("cuda", max_new_tokens=5)
    batches = batches_for(captioner, sizes=(64, 64))
    expected = comparable(caption(captioner, batches))
    captioner.model.free_memory()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        # Room for what is there, and for less than a batch: the logits of its beams alone are 39 MB.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (32 << 20)) / total)
        assert comparable(caption(captioner, batches)) == expected
        assert captioner.halvings > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("sets", SETTINGS)
def test_rows_of_the_job_are_the_cpus(
    tiny_clip: Path, tiny_smallcap: Path, tmp_path: Path, sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NODE["Resources"], "GPU", 1.0)
    given = (build_index(tmp_path, tiny_clip), tiny_smallcap, tmp_path, *sets)
    check_rows(rows_on("cuda", *given), rows_on("cpu", *given))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 2e-2)])
def test_losses_are_the_cpus(dtype: str, tolerance: float) -> None:
    expected = train(trainer_on("cpu", "float32"))
    found = train(trainer_on("cuda", dtype))
    if dtype == "float16":  # steps that overflow at first are left out, and the scale falls
        expected, found = expected[:1], found[:1]
    assert np.allclose([report.loss for report in found], [report.loss for report in expected], rtol=tolerance)
