"""DFlash drafters: our network against transformers' own, decoding against the network, and all layouts on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DFlashCache

from tests.drafters.driving import drafts
from zerodraft.cli.decoding import load_drafter
from zerodraft.cli.main import main
from zerodraft.decoding.huggingface import DiffuSpec
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_files import export_dflash, is_dflash, load_dflash, published_config
from zerodraft.drafters.dflash_model import (
    DFlashConfig,
    DFlashModel,
    default_taps,
    dflash_from_target,
    visible,
)
from zerodraft.errors import ZerodraftError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}
MASK = 63
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}


def make(family: str = "llama", block_size: int = 4, **changes):
    """A target and a drafter with random weights."""
    torch.manual_seed(0)
    target = TARGETS[family]().eval()
    drafter = dflash_from_target(target, num_layers=2, block_size=block_size, taps=3, mask_token_id=MASK)
    if changes:
        drafter = DFlashModel(DFlashConfig(**(drafter.config.to_dict() | changes))).bind(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return target, drafter.eval()


def states(target, drafter: DFlashModel, ids: Tensor) -> Tensor:
    hidden = target(ids, output_hidden_states=True).hidden_states
    return torch.stack([hidden[i + 1] for i in drafter.config.target_layer_ids], dim=2)


def logits_plainly(target, drafter: DFlashModel, ids: Tensor, taps: Tensor) -> Tensor:
    """The head's logits of one block after `ids`, whose last token has no states yet."""
    n = taps.shape[1]
    assert ids.shape[1] == n + 1
    embedding = target.get_input_embeddings().weight[ids[:, -1:]]
    hidden = drafter(taps, torch.ones(1, n, dtype=torch.bool), torch.tensor([[n - 1]]), embedding)
    return target.get_output_embeddings()(hidden[0, 0])


def draft_plainly(target, drafter: DFlashModel, ids: Tensor, taps: Tensor) -> Tensor:
    """Log-probabilities of it."""
    return logits_plainly(target, drafter, ids, taps).log_softmax(-1)


def draft_once(drafter: DFlashDrafter, ids: Tensor, taps: Tensor) -> Lattice:
    """Three tokens after `ids`."""
    session = drafter.start(1, torch.device("cpu"), None)
    session.observe([Progress(ids[0], taps[0])])
    return session.propose([3])[0]


def transformers_model(drafter: DFlashModel, folder: Path):
    export_dflash(drafter, folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert type(model).__name__ == "MuseGlimmerAssistantModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {**SLIDING, "causal_sliding": False}], ids=["full", "sliding"])
@torch.no_grad()
def test_network_is_that_of_transformers(tmp_path: Path, changes) -> None:
    target, drafter = make(**changes)
    theirs = transformers_model(drafter, tmp_path / "out")
    ids = torch.randint(60, (1, 40))
    taps = states(target, drafter, ids)
    noise = torch.tensor([[7] + [MASK] * 4])
    cache = DFlashCache(config=theirs.config)
    cache.activate_past_recording()
    cache.set_previous_accepted_tokens(40)
    expected = theirs(
        noise_embeds=target.get_input_embeddings()(noise),
        context_hidden_states=taps.flatten(2),
        attention_mask=torch.ones(1, 45),
        past_key_values=cache,
    ).last_hidden_state[0, 1:]
    embedding = target.get_input_embeddings().weight[noise[:, :1]]
    ours = drafter(taps, torch.ones(1, 40, dtype=torch.bool), torch.tensor([[39]]), embedding)[0, 0]
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("changes", [{}, SLIDING, {**SLIDING, "causal_sliding": False}], ids=["full", "causal", "both"])
@torch.no_grad()
def test_decoding_agrees_with_the_network(family: str, changes) -> None:
    """Through several steps that accept different numbers, past the first size of the cache, two rows at once."""
    target, drafter = make(family, **changes)
    fast = DFlashDrafter(drafter, target, candidates=5)
    assert fast.max_length == 4
    session = fast.start(2, torch.device("cpu"), None)
    ids = torch.randint(60, (2, 330))
    taps = [states(target, drafter, ids[row : row + 1]) for row in range(2)]
    for row, known, lattice in drafts(session, ids, taps):
        log_q = draft_plainly(target, drafter, ids[row : row + 1, : known + 1], taps[row][:, :known])
        top = log_q[: len(lattice)].topk(5)
        assert torch.allclose(torch.from_numpy(lattice.log_q), top.values, atol=1e-4)
        assert torch.equal(torch.from_numpy(lattice.ids), top.indices)


@torch.no_grad()
def test_blocks_of_one_pass_are_blocks_alone() -> None:
    target, drafter = make(**SLIDING)
    ids = torch.randint(60, (2, 20))
    taps, kept = states(target, drafter, ids), torch.ones(2, 20, dtype=torch.bool)
    anchors = torch.tensor([[3, 11, 7], [18, 0, 3]])
    embedding = target.get_input_embeddings().weight[ids.gather(1, anchors + 1)]
    together = drafter(taps, kept, anchors, embedding)
    for row in range(2):
        for block, t in enumerate(anchors[row].tolist()):
            alone = draft_plainly(target, drafter, ids[row : row + 1, : t + 2], taps[row : row + 1, : t + 1])
            logits = target.get_output_embeddings()(together[row, block])
            assert torch.allclose(logits.log_softmax(-1), alone, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {**SLIDING, "causal_sliding": False}], ids=["full", "sliding"])
@torch.no_grad()
def test_transformers_runtime_drafts_and_prints_the_same(tmp_path: Path, changes, monkeypatch) -> None:
    """transformers decodes with the exported drafter: the plain tokens, and step by step the drafts that we make."""
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator as Generator

    target, drafter = make(**changes)
    assistant = transformers_model(drafter, tmp_path / "out")
    prompt = torch.randint(60, (1, 9))
    how = {"max_new_tokens": 26, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = target.generate(prompt, **how)
    drafts, candidates = [], Generator.get_candidates

    def recording(self, input_ids, **kwargs):
        ids, logits = candidates(self, input_ids, **kwargs)
        if ids.shape[1] > input_ids.shape[1]:
            drafts.append(ids[0, input_ids.shape[1] :].tolist())
        return ids, logits

    monkeypatch.setattr(Generator, "get_candidates", recording)
    theirs = target.generate(prompt, assistant_model=assistant, speculation_type="dflash", **how)
    assert torch.equal(theirs, plain)
    spec = DiffuSpec(DFlashDrafter(drafter, target), length=FixedLength(4), tree=False, trace=True)
    assert torch.equal(target.generate(prompt, custom_generate=spec, **how), plain)
    assert spec.last_stats is not None
    assert spec.last_stats.trace is not None
    ours = [row.drafted for step in spec.last_stats.trace for row in step.rows if row and row.drafted]
    # at the end we draft no more than fits, and they count one place differently
    full = [draft for draft in ours if len(draft) == 4]
    assert len(full) >= 5
    assert full == drafts[: len(full)]


@pytest.mark.parametrize("tree", [False, True])
def test_greedy_and_batched_tokens_are_those_of_plain_decoding(tree: bool) -> None:
    target, drafter = make("qwen3")
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = torch.randint(60, (3, 7))
    plain = target.generate(prompts, **how)
    spec = DiffuSpec(DFlashDrafter(drafter, target), tree=tree)
    assert torch.equal(target.generate(prompts, custom_generate=spec, **how), plain)


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
    assert DFlashDrafter.from_pretrained(folder, target).taps == tuple(drafter.config.layers)


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


def test_windows_element_by_element() -> None:
    queries, keys = torch.tensor([[7, 8]]), torch.arange(12)[None]
    assert visible(queries, keys, None, True) is None
    for causal in (True, False):
        seen = visible(queries, keys, 3, causal)
        assert seen is not None
        for i, q in enumerate((7, 8)):
            for k in range(12):
                assert seen[0, i, k] == (q - 3 < k <= q if causal else abs(q - k) <= 3)


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


def test_only_a_model_of_our_own_loses_what_is_packed(tmp_path: Path) -> None:
    target, drafter = make(attention_bias=True)
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    drafter.save_pretrained(tmp_path)
    handed = DFlashDrafter(drafter, target, candidates=5)
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
    ours = DFlashDrafter.from_pretrained(tmp_path, target, candidates=5)
    kept = {name for name, value in ours.model.named_parameters() if not value.is_meta}
    assert kept == {name for name in before if "norm" in name} | {"fc.weight"}
    ids = torch.randint(60, (1, 30))
    taps = states(target, drafter, ids)[:, :29].detach()
    assert np.array_equal(draft_once(ours, ids, taps).log_q, draft_once(handed, ids, taps).log_q)


def test_starts_from_the_targets_layers() -> None:
    torch.manual_seed(0)
    target = TARGETS["qwen3"]()
    drafter = dflash_from_target(target, num_layers=2, taps=3, mask_token_id=MASK)
    weights = dict(target.model.layers[4].named_parameters())
    for name, parameter in drafter.layers[1].named_parameters():
        assert torch.equal(parameter, weights[name])
    assert torch.equal(drafter.mask_embedding, target.model.embed_tokens.weight[MASK])
    assert drafter.config.vocab_size == 64
    assert [default_taps(36, 5), default_taps(30, 5), default_taps(4, 2)] == [
        [1, 9, 17, 25, 33],
        [1, 8, 14, 20, 27],
        [0, 2],
    ]
    with pytest.raises(ZerodraftError, match="tap fewer"):
        default_taps(4, 4)


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_another_target_is_refused(size: str) -> None:
    _, drafter = make()
    other = LlamaForCausalLM(LlamaConfig(**(SIZES | {size: SIZES[size] * 2})))
    with pytest.raises(ZerodraftError, match=f"{size}={SIZES[size]}, this target has {SIZES[size] * 2}"):
        DFlashDrafter(drafter, other)


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
        load_drafter(str(tmp_path / "out"), target, "tiny")
    assert main(["export-drafter", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "DFlash2DraftModel, a kind of DFlash drafter that is not supported" in capsys.readouterr().err


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    _, drafter = make()
    export_dflash(drafter, tmp_path / "out")
    with pytest.raises(ZerodraftError, match="is there already"):
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


def test_offloaded_embeddings_are_refused() -> None:
    target, drafter = make()
    target.lm_head.to("meta")
    with pytest.raises(ZerodraftError, match="offloaded"):
        DFlashDrafter(drafter, target)
