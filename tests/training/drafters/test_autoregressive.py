"""Training an autoregressive drafter: layers against the target's, the loss against loops, a whole run with resume."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CTRLConfig,
    CTRLLMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from tests.saved import save, tiny_llama, tiny_tokenizer
from tests.training.resuming import learns_and_resumes, losses
from tests.ztt.tiny import FAMILIES, VOCABULARY, gap, logits, randomise, tiny, tiny_plain, tokens
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.training.drafters.autoregressive import draw_places, head_at, small_from_target, train_autoregressive
from zerodraft.training.drafters.autoregressive_recipe import AutoregressiveDrafterRecipe
from zerodraft.training.drafters.completions import Completion, read_completions, write_shard
from zerodraft.training.drafters.walk import measure_walks, walk
from zerodraft.training.recipe import read_recipe

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(tiny_llama(tokenizer))
    randomise(model)
    return save(model, tokenizer, tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_layers_it_is_the_target(family: str) -> None:
    target = tiny_plain(family)
    target.generation_config.eos_token_id = [2, 7]
    model = small_from_target(target, 0).eval()
    assert torch.equal(logits(model), logits(target))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (
        target.get_input_embeddings().weight is target.get_output_embeddings().weight
    )
    assert model.generation_config.eos_token_id == [2, 7]
    before = logits(target)
    randomise(model)
    assert torch.equal(logits(target), before)


def test_it_is_the_target_without_the_other_layers() -> None:
    target = tiny_plain()
    for take, kept in (("spread", [0, 3]), ("first", [0, 1]), ("last", [2, 3])):
        model = small_from_target(target, 2, take).eval()
        assert model.config.num_hidden_layers == len(model.model.layers) == 2
        oracle = copy.deepcopy(target)
        oracle.model.layers = nn.ModuleList([oracle.model.layers[i] for i in kept])
        with torch.no_grad():
            assert gap(logits(model), oracle(tokens(), use_cache=False).logits) == 0
            assert gap(logits(model), logits(target)) > 0.1
    # what a family's config says of each layer goes with it
    assert small_from_target(tiny_plain("gemma3"), 2).config.layer_types == ["sliding_attention", "full_attention"]
    assert small_from_target(tiny_plain("smollm3"), 3, "last").config.no_rope_layers == [0, 1, 0]


@pytest.mark.parametrize(
    ("target", "layers", "message"),
    [
        (tiny, 2, "A 'ztt' model cannot be made smaller"),
        (lambda: CTRLLMHeadModel(CTRLConfig(vocab_size=9, n_embd=8, n_head=2, n_layer=2, dff=8)), 1, "A 'ctrl' model"),
        (tiny_plain, 5, "The spread 5 layers were asked for, the target has 4"),
    ],
)
def test_targets_that_cannot_be_made_smaller(target: Any, layers: int, message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        small_from_target(target(), layers)


def test_places_are_those_of_drafted_tokens() -> None:
    dice = torch.Generator().manual_seed(0)
    # the first token after the prompt is the target's own
    assert sorted(draw_places(12, 4, 0, dice).tolist()) == list(range(5, 12))
    assert sorted(draw_places(12, 0, 99, dice).tolist()) == list(range(2, 12))
    drawn = [draw_places(12, 4, 3, dice).tolist() for _ in range(40)]
    assert all(len(set(places)) == 3 for places in drawn)
    assert {place for places in drawn for place in places} == set(range(5, 12))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_the_head_sees_only_the_positions(family: str) -> None:
    model, at = tiny_plain(family), torch.tensor([[0, 5, 3], [8, 8, 1]])
    whole = logits(model)
    with head_at(model, at):
        assert gap(logits(model), whole[torch.arange(2)[:, None], at]) < 1e-5
    assert torch.equal(logits(model), whole)


def recipe(target_folder: Path, completions_folder: Path, out: Path, **more: Any) -> AutoregressiveDrafterRecipe:
    settings = {
        "target": str(target_folder), "data": [str(completions_folder)], "out": str(out), "autoregressive.layers": 2,
        "autoregressive.positions": 8, "autoregressive.block_size": 3, "held_back.sequences": 2,
        "held_back.measured": 1, "training.steps": 20, "training.warmup_steps": 2, "training.learning_rate": 3e-3,
        "training.eval_every": 10, "training.save_every": 10,
    }  # fmt: skip
    return read_recipe(AutoregressiveDrafterRecipe, None, settings | more)


def test_loss_against_a_loop(target_folder: Path, target: LlamaForCausalLM, tmp_path: Path) -> None:
    dice, size = torch.Generator().manual_seed(3), target.config.vocab_size
    rows = [torch.randint(size, (length,), generator=dice).tolist() for length in (17, 30, 22)]
    # the greedy one is held back, so all the others are in the only batch
    shard = [Completion(row, 3, 1.0, "") for row in rows] + [Completion(rows[0], 3, 0.0, "")]
    write_shard(tmp_path, "a", shard, size)
    settings = {"held_back.sequences": 1, "autoregressive.positions": 0, "training.batch_size": 3, "training.steps": 1}
    train_autoregressive(recipe(target_folder, tmp_path, tmp_path / "run", **settings), callbacks=[])
    model, expected = small_from_target(target, 2).eval(), []
    for row in rows:
        for i in range(4, len(row)):
            with torch.no_grad():
                log_q = model(torch.tensor([row[:i]])).logits[0, -1].log_softmax(-1)
            expected.append(-float(log_q[row[i]]))
    assert losses(tmp_path / "run") == [pytest.approx(np.mean(expected), rel=1e-5)]


def test_accumulated_batches_are_one_batch(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((4, 1), (2, 2)):
        settings = {"training.batch_size": batch, "training.accumulation": accumulation, "training.steps": 2}
        out = tmp_path / str(batch)
        train_autoregressive(recipe(target_folder, completions_folder, out, **settings), callbacks=[])
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_run_learns_and_resumes_exactly(
    target_folder: Path, target: LlamaForCausalLM, completions_folder: Path, tmp_path: Path
) -> None:
    def in_folder(out: Path) -> AutoregressiveDrafterRecipe:
        return recipe(target_folder, completions_folder, out)

    load = AutoModelForCausalLM.from_pretrained
    whole, model = learns_and_resumes(train_autoregressive, in_folder, load, tmp_path)
    # embeddings and head stay the target's, and the optimizer has never heard of them
    start = dict(small_from_target(target, 2).named_parameters())
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, start[name])}
    assert moved == set(start) - {"model.embed_tokens.weight", "lm_head.weight"}
    groups = torch.load(tmp_path / "again" / "checkpoint-20" / "optimizer.pt")["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(moved)
    assert whole["trained_parameters"] == sum(start[name].numel() for name in moved)


def test_what_is_saved_drafts_everywhere(
    target_folder: Path, target: LlamaForCausalLM, completions_folder: Path, tmp_path: Path
) -> None:
    settings = {"training.save_every": 0, "training.eval_every": 0, "training.learning_rate": 1e-2}
    train_autoregressive(recipe(target_folder, completions_folder, tmp_path / "run", **settings), callbacks=[])
    folder = tmp_path / "run" / "model"
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(target_folder).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is LlamaForCausalLM
    assert model.config.num_hidden_layers == 2

    drafter, completions, steps = AutoregressiveDrafter(model), read_completions(completions_folder), 0
    for i in range(len(completions)):
        prompt = torch.from_numpy(completions[i][0][None, :4])
        plain = target.generate(prompt, max_new_tokens=20, **GREEDY)
        spec = DiffuSpec(drafter, length=FixedLength(3), tree=False)
        assert torch.equal(target.generate(prompt, max_new_tokens=20, custom_generate=spec, **GREEDY), plain)
        assert spec.last_stats is not None
        steps += spec.last_stats.steps
        assert torch.equal(target.generate(prompt, max_new_tokens=20, assistant_model=model, **GREEDY), plain)
    measured = measure_walks(partial(walk, drafter, k=3), completions, range(12), 3)
    assert measured.steps == steps < 12 * 19
    assert measured.mat == pytest.approx(12 * 19 / steps)

    # and on from there
    settings |= {"autoregressive.start": str(folder), "training.steps": 1, "training.learning_rate": 1e-9}
    train_autoregressive(recipe(target_folder, completions_folder, tmp_path / "more", **settings), callbacks=[])
    assert gap(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "more" / "model")), logits(model)) < 1e-4


def test_what_does_not_fit_is_refused(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    def start(**more: Any) -> None:
        train_autoregressive(recipe(target_folder, completions_folder, tmp_path / "x", **more), callbacks=[])

    with pytest.raises(ZerodraftError, match=r"autoregressive\.positions is -1; it must be at least 0"):
        start(**{"autoregressive.positions": -1})
    with pytest.raises(ZerodraftError, match="did you mean 'spread'"):
        start(**{"autoregressive.take": "spred"})
    with pytest.raises(ZerodraftError, match="The spread 7 layers were asked for, the target has 4"):
        start(**{"autoregressive.layers": 7})
    config = tiny_llama(tiny_tokenizer())
    config.vocab_size -= 5
    LlamaForCausalLM(config).save_pretrained(tmp_path / "fewer")
    with pytest.raises(ZerodraftError, match="another model"):
        start(**{"autoregressive.start": str(tmp_path / "fewer")})
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ZerodraftError, match="A mamba model cannot draft"):
        start(**{"autoregressive.start": str(tmp_path / "mamba")})
