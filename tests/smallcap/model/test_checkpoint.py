import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smallcap.errors import CheckpointError
from smallcap.model.checkpoint import load_checkpoint, load_config, save_checkpoint, tokenizer_source
from smallcap.model.files import checkpoint_id, joined_model_id
from tests.oracles import ORACLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of an oracle checkpoint, to be spoiled."""
    return Path(shutil.copytree(ORACLE / "gpt2_r4", tmp_path / "checkpoint"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_loads_as_the_same_model(tmp_path: Path) -> None:
    model = load_checkpoint(str(ORACLE / "gpt2_r4"))
    save_checkpoint(model, tmp_path)
    again = load_checkpoint(str(tmp_path))
    assert again.config.decoder == model.config.decoder
    assert again.config.template == model.config.template
    for (name, saved), (other_name, loaded) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(saved, loaded)
    save_checkpoint(model, tmp_path / "half", torch.float16)
    assert load_file(tmp_path / "half/model.safetensors")["decoder.transformer.wte.weight"].dtype == torch.float16
    assert load_checkpoint(str(tmp_path / "half")).dtype == torch.float32


def test_the_saved_layout_is_the_references(tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(str(ORACLE / "gpt2_r4")), tmp_path)
    reference = torch.load(ORACLE / "gpt2_r4" / "pytorch_model.bin", weights_only=True)
    saved = load_file(tmp_path / "model.safetensors")
    derived = {name for name in reference if name.endswith((".attn.bias", ".masked_bias", "attention.bias", "_ids"))}
    assert reference.keys() - derived - {"decoder.lm_head.weight"} == saved.keys()  # the head is tied
    assert all(torch.equal(reference[name], saved[name]) for name in saved)
    config, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, ORACLE / "gpt2_r4"))
    for key in ("model_type", "is_encoder_decoder", "eos_token_id", "pad_token_id", "k", "rag", "retrieval_encoder"):
        assert config[key] == theirs[key]
    for key in ("model_type", "n_embd", "n_layer", "n_head", "n_positions", "cross_attention_reduce_factor"):
        assert config["decoder"][key] == theirs["decoder"][key]
    assert config["encoder"]["vision_config"]["patch_size"] == theirs["encoder"]["vision_config"]["patch_size"]


@pytest.mark.parametrize("name", ["opt_r4", "xglm_r2"])
def test_other_decoders_load_save_and_load(name: str, tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[4] / "shared" / "oracle" / name
    if not source.is_dir():
        pytest.skip("the whole checkpoints of ../shared/oracle are absent")
    model = load_checkpoint(str(source))
    save_checkpoint(model, tmp_path)
    again = load_checkpoint(str(tmp_path))
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (model.config.bos_token_id is not None) == (name == "opt_r4")
    trained = model.decoder.cross_attention_parameters()
    assert trained
    assert all("encoder_attn" in parameter for parameter in trained)


def test_decoding_defaults_travel_with_the_checkpoint(folder: Path) -> None:
    edit_config(folder, generation={"num_beams": 2, "max_new_tokens": 5, "template": {"without_retrieval": "Here is "}})
    config = load_config(folder)
    assert (config.num_beams, config.max_new_tokens, config.length_penalty) == (2, 5, 0.0)
    assert config.template.without_retrieval == "Here is "
    assert config.template.with_retrieval.startswith("Similar images show")


def test_the_id_is_that_of_the_weights(folder: Path) -> None:
    name, _, digest = checkpoint_id(str(folder)).partition("@")
    assert name == "checkpoint"
    assert len(digest) == 12
    assert digest == checkpoint_id(str(ORACLE / "gpt2_r4")).partition("@")[2]
    assert load_checkpoint(str(folder)).model_id == checkpoint_id(str(folder))


def test_the_demos_id_is_the_same_beside_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = checkpoint_id("demo")
    (tmp_path / "demo").mkdir()  # as in a checkout
    assert checkpoint_id("demo") == elsewhere
    assert elsewhere.startswith("demo@")
    assert [name[:5] for name in joined_model_id("demo", "demo").split(" + ")] == ["demo@", "demo@"]


def test_code_in_a_weights_file_is_not_run(folder: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (folder / "pwned",)

    torch.save({"decoder": Attack()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_checkpoint(str(folder))
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "blip"}, "not a SmallCap checkpoint"),
        ({"decoder": {"model_type": "this_llama"}}, "unknown kind"),
        ({"decoder": {}}, "malformed"),
        ({"generation": {"beams": 3}}, "malformed"),
    ],
)
def test_a_wrong_config_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(folder))


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    del tensors["decoder.transformer.ln_f.weight"]
    tensors["decoder.adapter.weight"] = torch.zeros(2)
    tensors["decoder.transformer.wpe.weight"] = torch.zeros(7, 64)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    message = str(caught.value)
    assert "1 missing, such as decoder.transformer.ln_f.weight" in message
    assert "1 unknown, such as decoder.adapter.weight" in message
    assert "(7, 64), not (256, 64)" in message


def test_damaged_and_absent_weights_are_named(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights file"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        *((folder, "no such model folder") for folder in ("no/such/folder", "./nowhere", "/nowhere/at/all")),
        ("Yova/SmallCap7M-that-is-not-cached-here", "nor reachable"),
    ],
)
def test_an_absent_folder_and_an_unreachable_hub_id_are_named(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(source)


def test_a_checkpoint_without_tokenizer_uses_its_decoders(folder: Path) -> None:
    assert tokenizer_source(str(folder)) == "gpt2"
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_source(str(folder)) == str(folder)
