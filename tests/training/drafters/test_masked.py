"""Training a masked diffusion drafter: examples against loops, acceptance against decoding, a whole run with resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.training.resuming import learns_and_resumes, losses
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.masked_formats import load_masked
from zerodraft.drafters.masked_model import MaskedModel, masked_from_target
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.training.drafters.completions import read_completions
from zerodraft.training.drafters.masked import (
    block_example,
    blocks_example,
    collate,
    masked_loss,
    measure_masked,
    ratio_example,
    train_masked,
    walk_together,
)
from zerodraft.training.drafters.masked_recipe import MaskedDrafterRecipe
from zerodraft.training.drafters.walk import walk
from zerodraft.training.recipe import read_recipe

VOCABULARY, LAYERS = 48, 2


@pytest.fixture(scope="module")
def model(target: LlamaForCausalLM) -> MaskedModel:
    return masked_from_target(target, block_size=3, causal_prefix=True).eval()


def test_ratio_against_its_definition() -> None:
    tokens, n, prompt = torch.randint(VOCABULARY, (400,)), 400, 100
    shares = []
    for seed in range(40):
        for shifted in (True, False):
            e = ratio_example(tokens, prompt, 99, shifted, torch.Generator().manual_seed(seed))
            hidden = [i for i in range(n) if e.ids[i] == 99]
            assert hidden
            assert min(hidden) >= prompt
            assert e.at.tolist() == [i - shifted for i in hidden]
            assert e.labels.tolist() == [int(tokens[i]) for i in hidden]
            assert all(e.ids[i] == tokens[i] for i in range(n) if i not in hidden)
            assert e.visible.all()
            share = 1 / (float(e.weights[0]) * (n - prompt))
            # masked as often as its weight says
            assert abs(len(hidden) / (n - prompt) - share) < 0.15
        shares.append(share)
    assert max(shares) - min(shares) > 0.7


@pytest.mark.parametrize("shifted", [True, False])
def test_blocks_against_a_loop(shifted: bool) -> None:
    tokens, starts, k = torch.arange(10), torch.tensor([7, 3]), 4
    e = blocks_example(tokens, starts, k, 99, shifted, 0.5)
    assert e.ids.tolist() == [*range(10), *[99] * 8]
    text = 99
    blocks = [text] * 10 + [7] * 4 + [3] * 4
    positions = [*range(10), 7, 8, 9, 10, 3, 4, 5, 6]
    assert e.positions.tolist() == positions
    for q in range(18):
        for key in range(18):
            if blocks[key] != text:
                expected = blocks[key] == blocks[q]
            else:
                expected = key <= q if blocks[q] == text else key < blocks[q]
            assert e.visible[q, key] == expected
    wanted = []
    for a, start in enumerate(starts.tolist()):
        inside = min(k, 10 - start)
        total = sum(0.5**j for j in range(inside))
        for j in range(inside):
            at = start - 1 if shifted and j == 0 else 10 + a * k + j - shifted
            wanted.append((at, start + j, 0.5**j / total / 2))
    assert e.at.tolist() == [w[0] for w in wanted]
    assert e.labels.tolist() == [w[1] for w in wanted]
    assert e.weights.tolist() == pytest.approx([w[2] for w in wanted])

    one = block_example(tokens, 7, k, 99, shifted, 0.5)
    assert one.ids.tolist() == [*range(7), 99, 99, 99, 99]
    assert one.visible.all()
    assert one.at.tolist() == [7 - shifted, 8 - shifted, 9 - shifted]
    assert one.labels.tolist() == [7, 8, 9]
    assert one.weights.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


@torch.no_grad()
def test_training_and_decoding_compute_the_same(model: MaskedModel, target: LlamaForCausalLM) -> None:
    """The states that a block is trained on are those that draft, whatever else is in the batch."""
    tokens = torch.randint(VOCABULARY, (20,))
    examples = [blocks_example(tokens, torch.tensor([5, 9, 16]), 3, model.config.mask_token_id, True, 1.0)]
    examples.append(block_example(tokens[:12], 9, 3, model.config.mask_token_id, True, 1.0))
    batch = collate(examples)
    states = model(batch["ids"], batch["positions"], batch["visible"])
    assert states.isfinite().all()
    logits = model.lm_head(states[0, batch["at"][0]])[:, :VOCABULARY].log_softmax(-1).view(3, 3, VOCABULARY)
    for a, start in enumerate((5, 9, 16)):
        drafter = MaskedDrafter(model, candidates=VOCABULARY)
        session = drafter.start(1, torch.device("cpu"), None)
        session.observe([Progress(tokens[:start], None)])
        (lattice,) = session.propose([3])
        for j in range(3):
            ours = torch.from_numpy(lattice.log_q[j])
            assert torch.allclose(logits[a, j][torch.from_numpy(lattice.ids[j])], ours, atol=1e-4)


def test_loss_against_a_loop() -> None:
    logits, labels, weights = torch.randn(2, 3, 7), torch.randint(7, (2, 3)), torch.rand(2, 3)
    weights[1, 2] = 0
    expected = 0.0
    for b in range(2):
        for p in range(3):
            expected -= float(weights[b, p] * logits[b, p].log_softmax(0)[labels[b, p]]) / 2
    assert float(masked_loss(logits, labels, weights)) == pytest.approx(expected, rel=1e-5)


def test_acceptance_is_that_of_decoding(model: MaskedModel, target: LlamaForCausalLM, completions_folder: Path) -> None:
    completions, indices = read_completions(completions_folder), [0, 3, 7]
    drafter = MaskedDrafter(model, candidates=1)
    measured = measure_masked(drafter, completions, indices, 3)
    # with all of the target's layers and causal known tokens the first token of a draft is always right
    assert measured.by_position[0] == 1
    steps = 0
    for i in indices:
        tokens, prompt_length = completions[i]
        how = (drafter, torch.from_numpy(tokens), prompt_length + 1, 3)
        assert walk(*how) == walk_together(*how)
        spec = DiffuSpec(drafter, length=FixedLength(3), tree=False)
        target.generate(
            torch.from_numpy(tokens[None, :prompt_length]), max_new_tokens=len(tokens) - prompt_length,
            do_sample=False, eos_token_id=None, pad_token_id=0, custom_generate=spec,
        )  # fmt: skip
        assert spec.last_stats is not None
        steps += spec.last_stats.steps
    assert measured.steps == steps
    assert measured.mat == pytest.approx(3 * 19 / steps)


def recipe(target_folder: Path, completions_folder: Path, out: Path, **more: Any) -> MaskedDrafterRecipe:
    settings = {
        "target": str(target_folder), "data": [str(completions_folder)], "out": str(out), "masked.block_size": 3,
        "masked.blocks": 4, "held_back.sequences": 2, "held_back.measured": 1, "training.steps": 20,
        "training.warmup_steps": 2, "training.learning_rate": 3e-3, "training.eval_every": 10,
        "training.save_every": 10,
    }  # fmt: skip
    return read_recipe(MaskedDrafterRecipe, None, settings | more)


def test_a_run_learns_and_resumes_exactly(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    def in_folder(out: Path) -> MaskedDrafterRecipe:
        return recipe(target_folder, completions_folder, out)

    whole, model = learns_and_resumes(train_masked, in_folder, load_masked, tmp_path)
    assert whole["blocks"] == 20 * 2 * 4
    assert (model.config.block_size, model.config.causal_prefix) == (3, True)


@pytest.mark.parametrize("masking", ["ratio", "block"])
def test_full_attention(masking: str, target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"masked.masking": masking, "masked.layers": 1, "training.steps": 30}
    settings |= {"training.save_every": 0, "training.eval_every": 0, "training.learning_rate": 1e-2}
    train_masked(recipe(target_folder, completions_folder, tmp_path / "run", **settings), callbacks=[])
    found = losses(tmp_path / "run")
    assert np.mean(found[-10:]) < np.mean(found[:10])
    model = load_masked(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 1
    assert (model.config.block_size, model.config.causal_prefix) == (0 if masking == "ratio" else 3, False)
    # and on from there, with other masks
    more = {"masked.start": str(tmp_path / "run" / "model"), "training.steps": 2, "training.save_every": 0}
    train_masked(recipe(target_folder, completions_folder, tmp_path / "more", **more), callbacks=[])
    assert load_masked(tmp_path / "more" / "model").config.causal_prefix


def test_what_does_not_fit_is_refused(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ZerodraftError, match=r"masked\.decay is 0"):
        recipe(target_folder, completions_folder, tmp_path / "x", **{"masked.decay": 0.0})
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.bin").write_bytes(np.full(80, VOCABULARY + 1, "<u2").tobytes())
    (other / "a.jsonl").write_text(4 * (json.dumps({"n": 20, "p": 4, "temp": 0.0}) + "\n"))
    with pytest.raises(ZerodraftError, match="another model"):
        train_masked(recipe(target_folder, other, tmp_path / "x"), callbacks=[])
