"""DFlash drafters on disk: each layout means here what it means elsewhere, and what one cannot hold is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from tests.drafters.tiny_dflash import (
    MASK,
    SIZES,
    SLIDING,
    draft_once,
    draft_plainly,
    logits_plainly,
    make,
    states,
)
from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_files import export_dflash, is_dflash, load_dflash, published_config
from zerodraft.drafters.dflash_model import (
    visible,
)
from zerodraft.generate.drafters import find_drafter


@pytest.mark.parametrize("layout", ["transformers", "z-lab", "ours"])
def test_every_layout_loads_as_what_it_was(tmp_path: Path, layout) -> None:
    bias = {} if layout == "transformers" else {"attention_bias": True, **SLIDING}
    target, drafter = make(**bias)
    folder = tmp_path / "out"
    if layout == "ours":
        drafter.save_pretrained(folder)
    else:
        export_dflash(drafter, folder, layout)
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert json.loads((folder / "config.json").read_text())["block_size"] == 5
    assert is_dflash(folder)
    loaded = load_dflash(folder)
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    before, after = drafter.config.to_dict(), loaded.config.to_dict()
    fields = set(before) - {"transformers_version", "dtype", "architectures", "causal_sliding"}
    assert {name: before[name] for name in fields} == {name: after[name] for name in fields}
    assert torch.equal(loaded.rotary.inv_freq, drafter.rotary.inv_freq)
    run = folder.rename(tmp_path / "model").parent
    assert DFlashDrafter.from_pretrained(run, target).taps == tuple(drafter.config.layers)


def test_a_rotary_scaling_that_is_unknown_is_told_with_its_file(tmp_path: Path) -> None:
    export_dflash(make()[1], tmp_path / "out", "z-lab")
    config = tmp_path / "out" / "config.json"
    fields = json.loads(config.read_text())
    del fields["rope_parameters"]
    config.write_text(json.dumps(fields | {"rope_scaling": {"rope_type": "nonsense"}}))
    with pytest.raises(ZerodraftError, match=rf"config\.json in '{tmp_path / 'out'}' is not .*'nonsense' is unknown"):
        load_dflash(tmp_path / "out")


def test_a_published_config_is_read(tmp_path: Path) -> None:
    """The fields of a z-lab checkpoint as it is on the hub, older names of the rotary base included, in two files."""
    target, drafter = make()
    export_dflash(drafter, tmp_path / "out", "z-lab")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("rope_parameters", "is_causal", "vocab_size", "num_target_layers"):
        del fields[name]
    fields |= {"rope_scaling": None, "rope_theta": 12345.0, "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "out" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_dflash(tmp_path / "out")
    assert loaded.config.rope_parameters["rope_theta"] == 12345.0
    assert loaded.config.target_layer_ids == drafter.config.target_layer_ids
    DFlashDrafter(loaded, target)


def seen_by_runtimes(fields: dict, layer: int) -> Tensor:
    """Which places a layer's queries see in vLLM, written from its table; z-lab's code has fewer fields."""
    inner, kinds = fields.get("dflash_config") or {}, fields.get("layer_types")
    swa, any_sliding = inner.get("use_swa", False), kinds is not None and "sliding_attention" in kinds
    sliding = kinds[layer] == "sliding_attention" if any_sliding else swa
    causal = any_sliding and kinds[layer] == "sliding_attention"
    for said in (inner.get("causal"), fields.get("is_causal")):
        causal = causal if said is None else said
    back = torch.arange(40)[:, None] - torch.arange(40)
    seen = back >= 0 if causal else torch.ones(40, 40, dtype=torch.bool)
    window: Any = inner.get("swa_window_size", fields.get("sliding_window")) if sliding else 99
    return seen & (back.abs() < window)


MIXED, SLIDES = ["sliding_attention", "full_attention"], ["sliding_attention"] * 2


ATTENTION = [
    {},
    {"layer_types": MIXED, "sliding_window": 9},
    {"layer_types": MIXED, "sliding_window": 9, "is_causal": False},
    {"layer_types": SLIDES, "sliding_window": 9, "is_causal": True},
    {"layer_types": SLIDES, "sliding_window": 1, "is_causal": False},
    {"layer_types": SLIDES, "sliding_window": 9, "dflash_config": {"swa_window_size": 5}},
    {"layer_types": SLIDES, "sliding_window": 9, "dflash_config": {"causal": False}},
    {"layer_types": MIXED, "sliding_window": 9, "dflash_config": {"use_swa": True}},
    {"layer_types": ["full_attention"] * 2, "dflash_config": {"use_swa": True, "swa_window_size": 5}},
    {"layer_types": None, "sliding_window": 9, "dflash_config": {"use_swa": True}},
    {"layer_types": None, "dflash_config": {"use_swa": True, "swa_window_size": 5, "causal": True}},
]


@pytest.mark.parametrize("fields", ATTENTION, ids=str)
def test_layers_see_what_they_see_in_other_runtimes(tmp_path: Path, fields) -> None:
    """As read, and as written again."""
    export_dflash(make()[1], tmp_path / "out", "z-lab")
    file = tmp_path / "out" / "config.json"
    published = json.loads(file.read_text())
    for name in ("is_causal", "layer_types"):
        del published[name]
    published |= fields | {"dflash_config": published["dflash_config"] | fields.get("dflash_config", {})}
    file.write_text(json.dumps(published))
    config = load_dflash(tmp_path / "out").config
    places = torch.arange(40)[None]
    for layer in range(2):
        expected = seen_by_runtimes(published, layer)
        seen = visible(places, places, config.window(layer), config.causal_sliding)
        assert torch.equal(torch.ones_like(expected) if seen is None else seen[0], expected)
        assert torch.equal(seen_by_runtimes(published_config(config, "z-lab"), layer), expected)


def test_layers_of_transformers_cannot_be_causal(tmp_path: Path) -> None:
    export_dflash(make(**{**SLIDING, "causal_sliding": False})[1], tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": True, "layer_types": SLIDES}))
    with pytest.raises(ZerodraftError, match="layers of this layout see in both directions"):
        load_dflash(tmp_path / "out")


def test_what_sglang_runs_otherwise_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_dflash(make(**SLIDING)[1], tmp_path / "causal", "z-lab")
    export_dflash(make(**{**SLIDING, "causal_sliding": False})[1], tmp_path / "theirs")
    assert not caplog.records
    export_dflash(make(**{**SLIDING, "causal_sliding": False})[1], tmp_path / "both", "z-lab")
    assert "SGLang's only look back" in caplog.text


@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
@torch.no_grad()
def test_embeddings_are_scaled_as_the_file_says(tmp_path: Path, scale: float | None) -> None:
    """A target like Gemma multiplies its embeddings, which z-lab's drafters do by their own number."""
    _, drafter = make(embedding_scale=1.0 if scale is None else scale)
    layout = "transformers" if scale is None else "z-lab"
    export_dflash(drafter, tmp_path / "out", layout)
    if scale is None:
        file = tmp_path / "out" / "config.json"
        fields = json.loads(file.read_text())
        del fields["dflash_config"]
        file.write_text(json.dumps(fields))
    target = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16)).eval()
    embedding = target.get_input_embeddings()
    fast = DFlashDrafter.from_pretrained(tmp_path / "out", target, candidates=5)
    expected = 32**0.5 if scale is None else scale
    assert fast.model.embedding_scale == pytest.approx(expected)
    assert torch.allclose(fast.model.mask_embedding, expected * embedding.weight[MASK])
    assert published_config(fast.model.config, "z-lab")["dflash_config"]["input_embedding_scale"] == pytest.approx(
        expected
    )
    model = load_dflash(tmp_path / "out").bind(target)
    ids = torch.randint(60, (1, 20))
    taps = states(target, model, ids)[:, :19]
    expected = draft_plainly(target, model, ids, taps)[:3].topk(5).values
    assert torch.allclose(torch.from_numpy(draft_once(fast, ids, taps).log_q), expected, atol=1e-4)


@pytest.mark.parametrize("cap", [None, 0.5])
@torch.no_grad()
def test_logits_are_scaled_and_capped(tmp_path: Path, cap: float | None) -> None:
    target, drafter = make(output_multiplier=0.25, final_logit_softcapping=cap)
    with pytest.raises(ZerodraftError, match="export it as z-lab"):
        export_dflash(drafter, tmp_path / "out")
    export_dflash(drafter, tmp_path / "out", "z-lab")
    fast = DFlashDrafter.from_pretrained(tmp_path / "out", target, candidates=64)
    ids = torch.randint(60, (1, 9))
    taps = states(target, drafter, ids)[:, :8]
    logits = 0.25 * logits_plainly(target, drafter, ids, taps)
    logits = logits if cap is None else cap * (logits / cap).tanh()
    expected = logits.log_softmax(-1)[:3].sort(descending=True).values
    assert torch.allclose(torch.from_numpy(draft_once(fast, ids, taps).log_q), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "holds no DFlash drafter"),
        (
            {"architectures": ["DFlash2DraftModel"]},
            "a DFlash2DraftModel, a kind of DFlash drafter that is not supported:",
        ),
        (
            {"architectures": ["DFlash2DraftModel"], "selector_rank": 8, "conv_kernel_size": 2},
            "convolutions and a cand",
        ),
        ({"transformer_layer_config": {}}, "layout of speculators"),
        ({"rope_is_neox_style": False}, "rope_is_neox_style is False, and only True is supported"),
        ({"logit_scale": 2.0}, "logit_scale is 2.0"),
        ({"is_causal": True}, "is_causal is true, but full layers are only supported when they see in both directions"),
        ({"layer_types": None, "use_sliding_window": True}, "use_sliding_window is set without layer_types"),
        ({"num_hidden_layers": 3}, "layer_types"),
        ({"hidden_size": 16}, "do not fit its config"),
        ({"dflash_config": {"target_layer_ids": [3, 1]}, "mask_token_id": 5}, "strictly rising"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 3]}}, "mask_token_id"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 9], "mask_token_id": 5}}, "taps layer 9"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 3], "mask_token_id": 99}}, "masks are token 99"),
        ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ],
)
def test_unfit_checkpoints_are_refused(tmp_path: Path, fields, message: str) -> None:
    target, drafter = make()
    export_dflash(drafter, tmp_path / "out", "z-lab")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ZerodraftError, match=message):
        DFlashDrafter.from_pretrained(tmp_path / "out", target)


def test_commands_name_what_later_kinds_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, drafter = make()
    export_dflash(drafter, tmp_path / "out", "z-lab")
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text()) | {"architectures": ["DFlash2DraftModel"], "conv_kernel_size": 2}
    file.write_text(json.dumps(fields))
    with pytest.raises(ZerodraftError, match=r"DFlash2DraftModel, a kind of .* not supported \(it has convolutions\)"):
        find_drafter(str(tmp_path / "out"), target, "tiny")
    assert main(["export-drafter", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "DFlash2DraftModel, a kind of DFlash drafter that is not supported" in capsys.readouterr().err


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    _, drafter = make()
    export_dflash(drafter, tmp_path / "out")
    with pytest.raises(ZerodraftError, match="exists already"):
        export_dflash(drafter, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ZerodraftError, match="could not be loaded"):
        load_dflash(tmp_path / "out")
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ZerodraftError, match="NaN"):
        load_dflash(tmp_path / "out")
    assert not is_dflash(tmp_path)


def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZerodraftError, match="no biases"):
        export_dflash(make(attention_bias=True)[1], tmp_path / "a")
    with pytest.raises(ZerodraftError, match="only look back"):
        export_dflash(make(**SLIDING)[1], tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_files_say_what_each_runtime_reads() -> None:
    config = make()[1].config
    both = published_config(config, "transformers")
    assert both["architectures"] == ["MuseGlimmerAssistantModel"]
    assert (both["block_size"], both["mask_token_id"], both["is_causal"]) == (5, MASK, False)
    inner = {"mask_token_id": MASK, "target_layer_ids": both["target_layer_ids"], "input_embedding_scale": 1.0}
    assert both["dflash_config"] == inner
    zlab = published_config(config, "z-lab")
    assert (zlab["architectures"], zlab["model_type"]) == (["DFlashDraftModel"], "qwen3")
    assert {"vocab_size", "num_target_layers", "rope_theta", "rope_parameters"} <= zlab.keys()
