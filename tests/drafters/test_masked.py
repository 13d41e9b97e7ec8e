"""Masked diffusion drafters: parity with a plain implementation on the hub's own files, drafting, exact decoding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.drafters.masked_hub import (
    DREAM,
    FAMILIES,
    INNER,
    MASK,
    VOCABULARY,
    WIDTH,
    Plain,
    dream_plainly,
    dream_tensors,
    write,
)
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.masked import MaskedDrafter, denoise
from zerodraft.drafters.masked_formats import is_masked, load_masked
from zerodraft.drafters.masked_model import MaskedModel, masked_from_target
from zerodraft.drafters.taking import layers_to_take
from zerodraft.generate.huggingface import DiffuSpec


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor], Plain, bool]:
    config, make, plain = FAMILIES[request.param]
    torch.manual_seed(0)
    tensors = make()
    return write(tmp_path / "hub", config, tensors), tensors, plain, request.param == "Dream"


@torch.no_grad()
def test_parity_with_a_plain_implementation(family, tmp_path: Path) -> None:
    folder, tensors, plain, shifted = family
    ids = torch.randint(VOCABULARY, (2, 17))
    config = json.loads((folder / "config.json").read_text())
    assert is_masked(config["model_type"])
    for path in (folder, write(tmp_path / "sharded", config, tensors, shards=3)):
        model = load_masked(path)
        assert (model.config.shifted, model.config.mask_token_id) == (shifted, MASK)
        logits = model.lm_head(model(ids))
        for row in range(2):
            assert torch.allclose(logits[row].double(), plain(tensors, ids[row]), atol=1e-4)


@torch.no_grad()
def test_dtype_and_tied_embeddings(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in dream_tensors().items()}
    head = tensors.pop("lm_head.weight")
    folder = write(tmp_path / "tied", DREAM | {"tie_word_embeddings": True}, tensors)
    assert load_masked(folder).lm_head.weight.dtype == torch.bfloat16
    model = load_masked(folder, torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight
    ids = torch.randint(VOCABULARY, (1, 9))
    plain = dream_plainly(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, ids[0])
    assert torch.allclose(model.lm_head(model(ids))[0].double(), plain, atol=1e-4)
    assert not torch.equal(head, tensors["model.embed_tokens.weight"])


def progress(*tokens: Tensor) -> list[Progress]:
    return [Progress(row, None) for row in tokens]


def expected(plain: Plain, tensors: dict[str, Tensor], text: Tensor, block: Tensor, shifted: bool) -> Tensor:
    """Log-probabilities at the masks: all but the mask's own."""
    logits = plain(tensors, torch.cat([text, block]))[len(text) - shifted :][: len(block)]
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def test_one_step_drafts(family) -> None:
    """What became known in several portions, two rows of different lengths, with and without the packed weights."""
    folder, tensors, plain, shifted = family
    texts = torch.randint(58, (2, 30))
    target = LlamaForCausalLM(LlamaConfig(**SIZES))
    drafters = (
        MaskedDrafter(load_masked(folder), prefix_cache=False, candidates=5),
        MaskedDrafter.from_pretrained(folder, target, prefix_cache=False, candidates=5),
    )
    for drafter in drafters:
        session = drafter.start(2, torch.device("cpu"), None)
        known = [0, 0]
        for portion in ((6, 9), (1, 3), (4, 0)):
            ends = [a + b for a, b in zip(known, portion, strict=True)]
            session.observe(progress(*(texts[row, known[row] : ends[row]] for row in range(2))))
            known = ends
            for row, lattice in enumerate(session.propose([4, 3])):
                block = torch.full((4 - row,), MASK)
                top = expected(plain, tensors, texts[row, : known[row]], block, shifted).topk(5)
                assert np.allclose(lattice.log_q, top.values.float(), atol=1e-4)
                assert np.array_equal(lattice.ids, top.indices)
                assert not lattice.chain


@pytest.mark.parametrize("steps", [2, 3, 5])
@torch.no_grad()
def test_several_steps_against_a_loop(family, steps: int) -> None:
    folder, tensors, plain, shifted = family
    text, k = torch.randint(58, (11,)), 5
    drafter = MaskedDrafter(load_masked(folder), prefix_cache=False, candidates=3, steps=steps)
    session = drafter.start(1, torch.device("cpu"), None)
    session.observe(progress(text))
    (lattice,) = session.propose([k])

    block = torch.full((k,), MASK)
    for step in range(steps):
        log_q = expected(plain, tensors, text, block, shifted)
        masked = [i for i in range(k) if block[i] == MASK]
        goal = k * (step + 1) // steps
        surest = sorted(masked, key=lambda i: -float(log_q[i].max()))[: goal - (k - len(masked))]
        for i in surest:
            block[i] = log_q[i].argmax()
            top = log_q[i].topk(3)
            assert np.allclose(lattice.log_q[i], top.values.float(), atol=1e-4)
            assert np.array_equal(lattice.ids[i], top.indices)
    assert MASK not in block


def test_steps_fill_the_surest_first() -> None:
    """On made-up scores: position 2 is surest, and what it is filled with changes the others."""

    def score(block: Tensor, length: int) -> Tensor:
        p = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
        if block[2] == 1:
            p[0] = torch.tensor([0.1, 0.2, 0.7])
        return p[:length].log()

    log_q, ids = denoise(score, torch.full((4,), 9), 3, 1, 2)
    assert ids.tolist() == [[0, 1], [0, 1], [1, 0]]
    log_q, ids = denoise(score, torch.full((4,), 9), 3, 3, 2)
    assert ids.tolist() == [[2, 1], [0, 1], [1, 0]]
    assert log_q.exp()[:, 0].tolist() == pytest.approx([0.7, 0.5, 0.8])


@torch.no_grad()
def test_prefix_cache(family) -> None:
    """The first draft is that without a cache; later ones keep what the first pass made of the known tokens."""
    folder, _, _, _ = family
    model = load_masked(folder)
    text = torch.randint(58, (40,))
    sessions = [
        MaskedDrafter(model, prefix_cache=cached).start(1, torch.device("cpu"), None) for cached in (True, False)
    ]
    for begin, end, equal in ((0, 20, True), (20, 23, False), (23, 40, False)):
        lattices = []
        for session in sessions:
            session.observe(progress(text[begin:end]))
            lattices += session.propose([4])
        ours, plain = lattices
        assert np.allclose(ours.log_q, plain.log_q, atol=1e-4) == equal
        assert len(ours) == 4


@torch.no_grad()
def test_causal_prefix_makes_the_cache_exact() -> None:
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = masked_from_target(target, block_size=3, causal_prefix=True)
    shake(model)
    text = torch.randint(VOCABULARY, (400,))
    for steps in (1, 2):
        drafters = [MaskedDrafter(model, prefix_cache=cached, steps=steps) for cached in (True, False)]
        sessions = [drafter.start(1, torch.device("cpu"), None) for drafter in drafters]
        for begin, end in ((0, 20), (20, 21), (21, 350), (350, 353)):
            lattices = []
            for session in sessions:
                session.observe(progress(text[begin:end]))
                lattices += session.propose([2])
            assert np.allclose(lattices[0].log_q, lattices[1].log_q, atol=1e-4)
            assert np.array_equal(lattices[0].ids, lattices[1].ids)
    # twice without news: the same again
    (again,) = sessions[0].propose([2])
    assert np.allclose(again.log_q, lattices[0].log_q, atol=1e-5)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3 rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def shake(model: MaskedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", TARGETS)
@torch.no_grad()
def test_made_from_a_target_it_is_the_target_under_a_causal_mask(kind: str) -> None:
    torch.manual_seed(0)
    target = TARGETS[kind]().eval()
    model = masked_from_target(target).eval()
    ids = torch.randint(VOCABULARY, (2, 12))
    causal = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    logits = model.lm_head(model(ids, visible=causal))
    assert torch.allclose(logits[..., :-1], target(ids).logits, atol=1e-4)
    assert (model.lm_head.weight is model.embed_tokens.weight) == target.config.tie_word_embeddings
    # and without one it is not
    assert not torch.allclose(model.lm_head(model(ids))[..., :-1], target(ids).logits, atol=0.1)


def test_some_of_the_layers() -> None:
    assert layers_to_take(6, 2, "first") == [0, 1]
    assert layers_to_take(6, 2, "last") == [4, 5]
    assert layers_to_take(6, 3, "spread") == [0, 2, 5]
    target = TARGETS["qwen3"]()
    model = masked_from_target(target, 2, "spread")
    for ours, theirs in ((0, 0), (1, 3)):
        source = dict(target.model.layers[theirs].named_parameters())
        for name, parameter in model.layers[ours].named_parameters():
            assert torch.equal(parameter, source[name])
    assert torch.equal(model.embed_tokens.weight[-1], target.model.embed_tokens.weight.mean(0))


@pytest.mark.parametrize("kind", ["qwen2, tied", "qwen3"])
@torch.no_grad()
def test_own_checkpoints(kind: str, tmp_path: Path) -> None:
    model = masked_from_target(TARGETS[kind](), 2, block_size=5, causal_prefix=True).eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    loaded = load_masked(tmp_path)  # as a training run's folder
    ids = torch.randint(VOCABULARY, (1, 10))
    assert torch.equal(loaded.lm_head(loaded(ids)), model.lm_head(model(ids)))
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == model.config.tie_word_embeddings
    drafter = MaskedDrafter(loaded)
    assert (drafter.max_length, drafter.vocab_size, loaded.config.causal_prefix) == (5, VOCABULARY, True)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_decoding_writes_what_the_target_writes(family, steps: int, cached: bool) -> None:
    folder, _, _, _ = family
    torch.manual_seed(1)
    target = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    prompts = torch.randint(VOCABULARY, (2, 7))
    own = masked_from_target(target, block_size=6, causal_prefix=cached)
    options: dict[str, Any] = {"steps": steps, "prefix_cache": cached}
    drafters = (MaskedDrafter.from_pretrained(folder, target, **options), MaskedDrafter(own, **options))
    plain = target.generate(prompts, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    for drafter in drafters:
        spec = DiffuSpec(drafter, length=FixedLength(6))
        ours = target.generate(
            prompts, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0, custom_generate=spec
        )
        assert torch.equal(ours, plain)
    assert spec.last_stats is not None
    # with the target's own layers and causal known tokens, the first drafted token is what the target will choose
    assert spec.last_stats.mat > (1.8 if cached else 1)


@torch.no_grad()
def test_going_back_drafts_as_from_scratch(family) -> None:
    """Exactly where nothing is kept; with the cache, where known tokens see only what comes before them."""
    folder, _, _, _ = family
    target = LlamaForCausalLM(LlamaConfig(**SIZES))
    causal = masked_from_target(target, causal_prefix=True, block_size=4)
    shake(causal)
    for drafter in (MaskedDrafter(load_masked(folder), prefix_cache=False), MaskedDrafter(causal.eval())):
        text = torch.randint(58, (20,))
        session, anew = (drafter.start(1, torch.device("cpu"), None) for _ in range(2))
        session.observe(progress(torch.cat([text[:12], text[:4]])))
        session.propose([4])
        session.rewind(0, 12)
        session.observe(progress(text[12:]))
        anew.observe(progress(text))
        (lattice,), (expected,) = session.propose([4]), anew.propose([4])
        assert np.array_equal(lattice.ids, expected.ids)
        assert np.allclose(lattice.log_q, expected.log_q, atol=1e-4)


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_is_for_machines_that_have_it(tmp_path: Path, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in dream_tensors().items()}
    folder = write(tmp_path / "half", DREAM, tensors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units}, raising=False)
    target = LlamaForCausalLM(LlamaConfig(**SIZES))
    stored = torch.bfloat16 if units else torch.float32
    assert MaskedDrafter.from_pretrained(folder, target).model.dtype == stored
    assert MaskedDrafter.from_pretrained(folder, target, dtype=torch.float16).model.dtype == torch.float16


def test_positions_end_with_the_context() -> None:
    model = masked_from_target(LlamaForCausalLM(LlamaConfig(**(SIZES | {"max_position_embeddings": 16}))))
    session = MaskedDrafter(model).start(1, torch.device("cpu"), None)
    assert len(session.propose([3])[0]) == 0  # nothing known yet
    session.observe(progress(torch.randint(VOCABULARY, (14,))))
    assert len(session.propose([8])[0]) == 2
    session.observe(progress(torch.randint(VOCABULARY, (2,))))
    assert len(session.propose([8])[0]) == 0


def test_only_tokens_of_the_target_are_drafted(family) -> None:
    """A target whose embedding has fewer rows, and one with more, whose last tokens the drafter does not know."""
    folder, _, _, _ = family
    for size in (40, 70):
        target = LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": size})))
        drafter = MaskedDrafter.from_pretrained(folder, target, candidates=100)
        drafter.check(target.config)
        session = drafter.start(1, torch.device("cpu"), None)
        session.observe(progress(torch.tensor([1, 2, size - 1])))
        (lattice,) = session.propose([3])
        real = lattice.ids[lattice.log_q > -np.inf]
        assert real.max() < min(size, VOCABULARY)
        assert MASK not in real
        assert np.allclose(np.exp(lattice.log_q).sum(1), 1, atol=1e-4)


def test_what_does_not_fit_is_refused(family, tmp_path: Path) -> None:
    folder, tensors, _, dream = family
    config = json.loads((folder / "config.json").read_text())
    target = LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": 5000})))
    with pytest.raises(ZerodraftError, match="vocabulary has 64 tokens, the target's 5000"):
        MaskedDrafter.from_pretrained(folder, target)
    drafter = MaskedDrafter(load_masked(folder))
    with pytest.raises(ZerodraftError, match="vocabulary of 64 tokens, the target's has 5000"):
        drafter.check(target.config)
    with pytest.raises(ZerodraftError, match="0 steps"):
        MaskedDrafter(load_masked(folder), steps=0)

    def refused(match: str, fields: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None) -> None:
        path = write(tmp_path / "odd", config | (fields or {}), tensors if weights is None else weights)
        with pytest.raises(ZerodraftError, match=match):
            load_masked(path)

    refused("a model of type 'gpt9'; the masked diffusion models", {"model_type": "gpt9"})
    refused(
        "has no 'num_attention_heads'" if dream else "has no 'n_heads'", {"num_attention_heads": None, "n_heads": None}
    )
    refused(
        "'use_mrope' is True" if dream else "'block_type' is 'sequential'",
        {"use_mrope": True, "block_type": "sequential"},
    )
    refused("mask_token_id=99, but the embedding has 64 rows", {"mask_token_id": 99})
    norm = "model.norm.weight" if dream else "model.transformer.ln_f.weight"
    refused("lacks the weights of 'norm.weight'", weights={n: t for n, t in tensors.items() if n != norm})
    refused(r"has shape \(3,\), but config.json makes it \(32,\)", weights=tensors | {norm: torch.ones(3)})
    refused("holds a tensor 'vision.weight'", weights=tensors | {"vision.weight": torch.ones(3)})
    refused("holds NaN", weights=tensors | {norm: torch.full((WIDTH,), torch.nan)})
    (tmp_path / "odd" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ZerodraftError, match="could not be loaded"):
        load_masked(tmp_path / "odd")
    (tmp_path / "odd" / "model.safetensors").unlink()
    with pytest.raises(ZerodraftError, match=r"model\.safetensors' is missing"):
        load_masked(tmp_path / "odd")
    index = tmp_path / "odd" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ZerodraftError, match="not beside it"):
        load_masked(tmp_path / "odd")
    index.write_text("{}")
    with pytest.raises(ZerodraftError, match="no weight_map"):
        load_masked(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text("[")
    with pytest.raises(ZerodraftError, match="is not JSON"):
        load_masked(tmp_path / "odd")
    with pytest.raises(ZerodraftError, match="no such directory or file"):
        load_masked(tmp_path / "nowhere")


def test_targets_of_other_kinds_are_refused() -> None:
    target = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ZerodraftError, match="the target has 4: choose 1 to 4"):
        masked_from_target(target, 5)
    target.config.model_type = "gemma3_text"
    with pytest.raises(ZerodraftError, match="a target of the kind llama"):
        masked_from_target(target)
