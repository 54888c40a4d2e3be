"""What decoding, encoders and the search do on a GPU only: shapes, precision, recordings, and memory that runs out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smallcap.config import GenerationConfig
from smallcap.decoding import text_decoder
from smallcap.decoding.engine import Generated
from smallcap.decoding.micro_batches import MicroBatches
from smallcap.model.checkpoint import SmallCapModel, load_checkpoint
from smallcap.model.clip_encoder import load_retrieval_encoder
from tests.oracles import ORACLE, load_decoder, random_inputs
from tests.pretended_cuda.torch_cuda import pretended_cuda

CHECKPOINT = str(ORACLE / "gpt2_r4")


def token_ids(generated: list[list[Generated]]) -> list[list[list[int]]]:
    return [[caption.token_ids for caption in captions] for captions in generated]


def caption(model: SmallCapModel, count: int, seed: int = 0) -> list[list[list[int]]]:
    hidden_states, prompts = random_inputs(count, seed, longest=60)
    options = model.generation_options(GenerationConfig(max_new_tokens=10))
    return token_ids(model.generate(hidden_states.to(model.device), prompts, options))


def test_recordings_share_a_pool_and_a_stream_until_memory_is_freed() -> None:
    expected = [caption(load_checkpoint(CHECKPOINT), count) for count in (3, 5, 9)]
    with pretended_cuda() as cuda:
        model = load_checkpoint(CHECKPOINT, "cuda")
        caption(model, 16)  # the storage is then large enough for all
        first = len(cuda.captures)
        assert [caption(model, count) for count in (3, 5, 9)] == expected
        assert len({capture.pool for capture in cuda.captures[first:]}) == 1
        assert len({capture.stream for capture in cuda.captures}) == 1
        assert {capture.error_mode for capture in cuda.captures} == {"thread_local"}
        before = {capture.pool for capture in cuda.captures}
        model.free_memory()
        assert caption(model, 9) == expected[-1]
        assert cuda.captures[-1].pool not in before
        assert not cuda.hazards


def test_random_batches_have_few_attention_shapes() -> None:
    with pretended_cuda() as cuda:
        model = load_checkpoint(CHECKPOINT, "cuda")
        for seed in range(8):
            caption(model, 1 + 3 * seed, seed)
        prefill = {(query[0], query[2]) for query, *_ in cuda.attention_shapes if query[2] > 3}
        assert len(prefill) > 3
        assert all(rows & (rows - 1) == 0 and tokens % 16 == 0 for rows, tokens in prefill)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    hidden_states = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_cpu = load_decoder("gpt2_r4").to(dtype)
    exact = hidden_states.float() @ on_cpu.token_embedding.float().T
    with pretended_cuda():
        logits = load_decoder("gpt2_r4").to("cuda", dtype).logits(hidden_states.to("cuda"))
        assert logits.dtype == torch.float32
        assert torch.allclose(logits.cpu(), exact, atol=1e-5)
    assert on_cpu.logits(hidden_states).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_layer_of_whole_rows_gives_the_same_logits(dtype: torch.dtype) -> None:
    decoder = load_decoder("gpt2_r4").to(dtype)
    words = decoder.transformer.wte
    words.weight = torch.nn.Parameter(words.weight[:-3])  # as odd as GPT-2's
    hidden_states = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with pretended_cuda():
        decoder.to("cuda")
        expected = decoder.logits(hidden_states.to("cuda")).cpu()
        decoder.pack()
        assert torch.equal(decoder.logits(hidden_states.to("cuda")).cpu(), expected)
        assert expected.shape == (3, 2, 597)
        assert (decoder._padded_head is not None) == (dtype != torch.float32)


def test_steps_attend_to_whole_rows_of_slots_and_to_nothing_in_the_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = caption(load_checkpoint(CHECKPOINT), 5)
    slots: list[int] = []
    attend = text_decoder._attend_by_products

    def noting(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, scale: float) -> Any:
        slots.extend([keys.shape[2]] * (mask is not None))
        return attend(queries, keys, values, mask, scale)

    monkeypatch.setattr(text_decoder, "_attend_by_products", noting)
    with pretended_cuda():
        model = load_checkpoint(CHECKPOINT, "cuda")
        assert caption(model, 5) == expected
        for name in ("keys", "values"):  # what no beam sees has a weight of 0, and 0 * NaN would be NaN
            assert torch.isfinite(model.stepper._storage[name, torch.float32].cpu()).all()
    assert slots
    assert all(count % 8 == 0 for count in slots)


def test_loading_a_float32_model_switches_tf32_off_and_others_do_not() -> None:
    with pretended_cuda():
        load_checkpoint(CHECKPOINT, "cuda", "bfloat16")
        assert torch.backends.cudnn.allow_tf32
        load_checkpoint(CHECKPOINT, "cuda")
        assert not torch.backends.cudnn.allow_tf32


def test_encoders_meet_few_shapes_and_embed_as_on_a_cpu(tiny_clip: Path) -> None:
    spec = f"hf:{tiny_clip}"
    on_cpu = load_retrieval_encoder(spec)
    size = on_cpu.preprocessing.size_px
    with pretended_cuda() as cuda:
        encoder = load_retrieval_encoder(spec, "cuda")
        for count in range(1, 12):
            texts = ["word " * (1 + 7 * number) for number in range(count)]  # the longest are cut to 77 tokens
            assert np.allclose(encoder.encode_texts(texts), on_cpu.encode_texts(texts), atol=1e-5)
            pixel_values = torch.randn(count, 3, size, size)
            embedded = encoder.encode_images(pixel_values.to("cuda")).cpu().numpy()
            assert np.allclose(embedded, on_cpu.encode_images(pixel_values).numpy(), atol=1e-5)
        shapes = {(query[0], query[2]) for query, *_ in cuda.attention_shapes}
        assert {rows for rows, _ in shapes} == {1, 2, 4, 8, 16}
        assert {tokens for _, tokens in shapes} <= {16, 32, 48, 64, 77, (size // 16) ** 2 + 1}


def test_captions_do_not_change_where_memory_runs_out() -> None:
    expected = caption(load_checkpoint(CHECKPOINT), 24)
    hidden_states, prompts = random_inputs(24, longest=60)
    with pretended_cuda() as cuda:
        model = load_checkpoint(CHECKPOINT, "cuda")
        options = model.generation_options(GenerationConfig(max_new_tokens=10))
        on_gpu = hidden_states.to("cuda")
        cuda.order.total_bytes = cuda.order.allocated_bytes + (4 << 20)  # room for the batch's prompts, hardly more

        def free() -> None:
            model.free_memory()
            cuda.captures.clear()  # they hold the recordings, and with them their memory

        micro_batches = MicroBatches("the decoder", free, relief="Use fewer beams")
        for _ in range(2):
            parts = micro_batches.run(24, lambda rows: model.generate(on_gpu[rows], prompts[rows], options))
            assert [captions for part in parts for captions in token_ids(part)] == expected
        assert micro_batches.limit is not None and micro_batches.limit < 24
