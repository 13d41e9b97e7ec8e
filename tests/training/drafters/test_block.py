"""Training a block drafter: examples, loss and acceptance against loops, and a whole run with resume."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import BlockDrafterModel, drafter_from_target
from zerodraft.training.drafters.acceptance import measure_acceptance
from zerodraft.training.drafters.block import frequent_tokens, train_drafter
from zerodraft.training.drafters.blocks import block_loss, collate, coupled_loss, draw_anchors, first_anchor, repeated
from zerodraft.training.drafters.completions import check_vocabulary, read_completions
from zerodraft.training.drafters.features import FeatureCache, FreshFeatures
from zerodraft.training.drafters.recipe import DrafterRecipe
from zerodraft.training.drafters.run import split_completions
from zerodraft.training.recipe import read_recipe

VOCABULARY, LAYERS = 64, 3


@pytest.fixture(scope="module")
def completions_folder(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy and sampled completions by the target itself."""
    folder = tmp_path_factory.mktemp("completions")
    torch.manual_seed(1)
    sequences, index = [], []
    for i in range(24):
        prompt = torch.randint(VOCABULARY, (1, 3 + i % 5))
        how = {"do_sample": False} if i % 3 else {"do_sample": True, "temperature": 0.8, "top_k": 0}
        ids = target.generate(prompt, max_new_tokens=20 + i, eos_token_id=None, pad_token_id=0, **how)[0]
        sequences.append(ids.numpy())
        index.append({"n": len(ids), "p": prompt.shape[1], "temp": 0.0 if i % 3 else 0.8, "src": "test"})
    (folder / "a.bin").write_bytes(np.concatenate(sequences).astype("<u2").tobytes())
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))
    return folder


@pytest.fixture
def features(target: LlamaForCausalLM, completions_folder: Path, tmp_path: Path) -> FeatureCache:
    return FeatureCache(target, read_completions(completions_folder), [1, 2, LAYERS], tmp_path / "features")


@torch.no_grad()
def test_features_are_the_targets_states(features: FeatureCache, target: LlamaForCausalLM) -> None:
    tokens, _ = features.completions[3]
    hidden = target(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states
    for _ in range(2):  # computed, then read
        for tap, layer in enumerate([1, 2, LAYERS]):
            assert torch.allclose(features[3][:, tap], hidden[layer][0], rtol=1e-3, atol=1e-3)
    assert [index for index in range(24) if index in features] == [3]


def test_features_of_another_target_are_not_taken(
    features: FeatureCache, target_folder: Path, completions_folder: Path, tmp_path: Path
) -> None:
    before = features[0]
    other = LlamaForCausalLM.from_pretrained(target_folder).eval()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(-1)
    anew = FeatureCache(other, features.completions, features.taps, tmp_path / "features")
    assert not any(index in anew for index in range(24))
    assert not torch.allclose(anew[0], before, atol=0.1)


def test_features_need_room(
    target: LlamaForCausalLM, completions_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ZerodraftError, match="GB are free"):
        FeatureCache(target, read_completions(completions_folder), [1], tmp_path / "small")


def test_a_resumed_cache_needs_room_for_the_rest(
    features: FeatureCache, target: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(23):
        features[i]
    rest = 2 * int(features.completions.lengths[23]) * 3 * 32
    for free in (rest, rest - 1):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free})())
        if free == rest:
            FeatureCache(target, features.completions, features.taps, tmp_path / "features")
        else:
            with pytest.raises(ZerodraftError, match="GB are free"):
                FeatureCache(target, features.completions, features.taps, tmp_path / "features")


@pytest.mark.parametrize("key", [None, "[1]", '{"shape": 3}'])
def test_a_folder_of_someone_else_is_left_alone(
    features: FeatureCache, target: LlamaForCausalLM, tmp_path: Path, key: str | None
) -> None:
    folder = tmp_path / "thesis"
    (folder / "chapters").mkdir(parents=True)
    (folder / "chapters" / "one.tex").write_text("years of work")
    if key is not None:
        (folder / "key.json").write_text(key)
    with pytest.raises(ZerodraftError, match="holds other files"):
        FeatureCache(target, features.completions, features.taps, folder)
    assert (folder / "chapters" / "one.tex").read_text() == "years of work"


def test_only_the_caches_own_files_are_replaced(
    features: FeatureCache, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "features" / "notes.txt").write_text("mine")
    anew = FeatureCache(target, features.completions, [1], tmp_path / "features")
    assert anew[0].shape[1] == 1
    assert (tmp_path / "features" / "notes.txt").read_text() == "mine"


def test_a_cache_that_was_cut_off_is_made_anew(
    features: FeatureCache, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    features[0]
    (tmp_path / "features" / "states.f16").write_bytes(b"")
    anew = FeatureCache(target, features.completions, features.taps, tmp_path / "features")
    assert not any(index in anew for index in range(24))


def test_states_are_on_the_disk_before_they_count(features: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    done_at_flush = []
    monkeypatch.setattr(type(features._states), "flush", lambda self: done_at_flush.append(int(features._done[0])))
    features[0]
    assert done_at_flush == [0]
    assert features._done[0] == 1


def test_targets_that_give_all_logits(features: FeatureCache, target: LlamaForCausalLM, tmp_path: Path) -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids, output_hidden_states=False, use_cache=True):
            return super().forward(input_ids, output_hidden_states=output_hidden_states, use_cache=use_cache)

    plain = Plain(target.config).eval()
    plain.load_state_dict(target.state_dict())
    other = FeatureCache(plain, features.completions, features.taps, tmp_path / "plain")
    assert torch.equal(other[0], features[0])


def test_blocks_against_a_loop(features: FeatureCache) -> None:
    torch.manual_seed(0)
    indices, k = [2, 9], 5
    anchors = [draw_anchors(features, i, 30, seed=i) for i in indices]
    blocks = collate(features, indices, anchors, k)
    for row, i in enumerate(indices):
        tokens, prompt_length = features.completions[i]
        for a, t in enumerate(anchors[row].tolist()):
            assert first_anchor(prompt_length) <= t <= len(tokens) - 3
            assert blocks.newest[row, a] == tokens[t + 1]
            for j in range(k):
                inside = t + 2 + j < len(tokens)
                assert blocks.is_label[row, a, j] == inside
                if inside:
                    assert blocks.labels[row, a, j] == tokens[t + 2 + j]
                    assert torch.equal(blocks.target_states[row, a, j], features[i][t + 1 + j, -1])
        assert blocks.kept[row].sum() == len(tokens)


def test_no_block_starts_in_a_copy(features: FeatureCache) -> None:
    """With `copied`: where as many tokens have stood together before, looked for one place after another."""
    for index in range(len(features.completions)):
        tokens, prompt_length = features.completions[index]
        expected = set()
        for start in range(first_anchor(prompt_length), len(tokens) - 2):
            known = tokens[: start + 2].tolist()
            if not any(known[i : i + 2] == known[-2:] for i in range(len(known) - 2)):
                expected.add(start)
        drawn = draw_anchors(features, index, max(len(expected), 1), seed=0, copied=2).tolist()
        assert set(drawn) == expected or not expected


def test_repeated_tokens_against_a_loop() -> None:
    dice = np.random.default_rng(0)
    for size in (0, 1, 2, 40):
        tokens = dice.integers(0, 3, size)
        for count in (1, 2, 3, 6):
            for i, found in enumerate(repeated(tokens, count).tolist()):
                known = tokens[: i + 1].tolist()
                last = known[i + 1 - count :] if i + 1 >= count else None
                assert found == any(known[at - count : at] == last for at in range(count, i + 1))


@torch.no_grad()
def test_target_states_give_the_completions_tokens(features: FeatureCache, target: LlamaForCausalLM) -> None:
    """The labels and the distributions fit: greedy completions are what the target's states choose."""
    blocks = collate(features, [1], [draw_anchors(features, 1, 10, seed=0)], 4)
    chosen = target.lm_head(blocks.target_states).argmax(-1)
    assert torch.equal(chosen[blocks.is_label], blocks.labels[blocks.is_label])


@pytest.mark.parametrize("label", ["tokens", "distribution", "both", "variation"])
def test_loss_against_a_loop(label) -> None:
    torch.manual_seed(0)
    q, p = torch.randn(2, 3, 4, 7), torch.randn(2, 3, 4, 7)
    labels, counts = torch.randint(-1, 7, (2, 3, 4)), torch.rand(2, 3, 4) > 0.3
    parts = {"tokens": [0.0, 0.0], "distribution": [0.0, 0.0], "variation": [0.0, 0.0]}
    for b, a, j in np.ndindex(2, 3, 4):
        if counts[b, a, j]:
            log_q, log_p = q[b, a, j].log_softmax(0), p[b, a, j].log_softmax(0)
            if labels[b, a, j] >= 0:
                parts["tokens"][0] -= 0.7**j * log_q[labels[b, a, j]].item()
                parts["tokens"][1] += 0.7**j
            parts["distribution"][0] += 0.7**j * (log_p.exp() * (log_p - log_q)).sum().item()
            # a draft of q is accepted by p with this probability
            accepted = sum(min(p_x, q_x) for p_x, q_x in zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True))
            parts["variation"][0] += 0.7**j * (1 - accepted)
            for name in ("distribution", "variation"):
                parts[name][1] += 0.7**j
    means = {name: total / weight for name, (total, weight) in parts.items()}
    expected = {
        **means,
        "both": (means["tokens"] + means["distribution"]) / 2,
        "variation": 0.1 * means["tokens"] + 0.9 * means["variation"],
    }[label]
    assert block_loss(q, p, labels, counts, label, 0.7).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", ["tokens", "both", "variation"])
def test_coupled_loss_against_a_loop(label) -> None:
    """Each slot is judged among its own likeliest tokens; labels that are not among them say nothing."""
    torch.manual_seed(0)
    coupled, logits, p = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 9), torch.randn(2, 3, 4, 9)
    head, labels, counts = torch.randn(9, 5), torch.randint(-1, 9, (2, 3, 4)), torch.rand(2, 3, 4) > 0.3
    among, small_p, small_labels = torch.empty(2, 3, 4, 6), torch.empty(2, 3, 4, 6), torch.full((2, 3, 4), -1)
    for place in np.ndindex(2, 3, 4):
        ids = logits[place].argsort(descending=True)[:6]
        among[place], small_p[place] = head[ids] @ coupled[place], p[place][ids]
        if labels[place] in ids:
            small_labels[place] = ids.tolist().index(labels[place])
    expected = block_loss(among, small_p, small_labels, counts, label, 0.7)
    found = coupled_loss(coupled, logits, head, p, labels, counts, label, 0.7, candidates=6)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def most_likely(lattice: Lattice) -> np.ndarray:
    """The tokens of each slot's likeliest candidate, after the one before."""
    if lattice.pairs is None:
        return lattice.ids[:, 0]
    path, at = [], 0
    for ids, pairs in zip(lattice.ids, lattice.pairs, strict=True):
        at = int(pairs[at].argmax())
        path.append(ids[at])
    return np.array(path)


@pytest.mark.parametrize("coupling", [0, 8])
@torch.no_grad()
def test_acceptance_is_that_of_decoding(features: FeatureCache, target: LlamaForCausalLM, coupling: int) -> None:
    """The measured tokens per pass are those of a plain loop of draft and check with the drafter at work."""
    torch.manual_seed(0)
    model = drafter_from_target(target, num_layers=2, block_size=4, coupling=coupling).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("coupling"):
            parameter.add_(0.5 * torch.randn_like(parameter))
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    indices = [1, 2, 4, 5]
    measured = measure_acceptance(model, features, indices, embedding, head)
    drafter, new_tokens, accepted = BlockDrafter(model, target), 0, []
    for i in indices:
        tokens, prompt_length = features.completions[i]
        session, t, seen = drafter.start(1, torch.device("cpu"), None), prompt_length - 1, 0
        while t < len(tokens) - 2:
            session.observe([Progress(torch.tensor(tokens[seen : t + 2]), features[i][seen : t + 1, :-1])])
            seen = t + 1
            (lattice,) = session.propose([4])
            right = (most_likely(lattice)[: len(tokens) - t - 2] == tokens[t + 2 : t + 6]).cumprod()
            accepted.append(int(right.sum()))
            t += accepted[-1] + 1
        new_tokens += len(tokens) - prompt_length - 1
    assert measured.steps == len(accepted)
    assert measured.mat == pytest.approx(new_tokens / len(accepted))
    for j in range(4):
        assert measured.by_position[j] == pytest.approx(np.mean(np.array(accepted) > j))
    assert np.allclose(measured.ranks.sum(1), 1)


def test_held_back_completions_are_greedy_and_not_trained_on(completions_folder: Path) -> None:
    completions = read_completions(completions_folder)
    train, held_back = split_completions(completions, 5, seed=0)
    assert len(held_back) == 5
    assert not set(train) & set(held_back)
    assert (completions.temperatures[held_back] == 0).all()
    with pytest.raises(ZerodraftError, match="17 greedy completions are to be held back"):
        split_completions(completions, 17, seed=0)


def test_frequent_tokens(completions_folder: Path) -> None:
    completions = read_completions(completions_folder)
    counts = np.zeros(VOCABULARY)
    for i in range(24):
        tokens, prompt_length = completions[i]
        for token in tokens[prompt_length:]:
            counts[token] += 1
    chosen = frequent_tokens(completions, range(24), 10, VOCABULARY).numpy()
    assert counts[chosen].sum() == np.sort(counts)[-10:].sum()
    check_vocabulary(completions, VOCABULARY)
    with pytest.raises(ZerodraftError, match="another model"):
        check_vocabulary(completions, 40)


def recipe(target_folder: Path, completions_folder: Path, out: Path, **training):
    settings = {
        "target": str(target_folder), "data": [str(completions_folder)], "out": str(out),
        "drafter.layers": 2, "drafter.block_size": 4, "drafter.draft_vocab": 40,
        "loss.label": "both", "loss.anchors": 6, "held_back.sequences": 4, "held_back.measured": 2,
    }  # fmt: skip
    training = {"steps": 40, "warmup_steps": 2, "learning_rate": 3e-3, "eval_every": 20, "save_every": 20} | training
    return read_recipe(DrafterRecipe, None, settings | {f"training.{key}": value for key, value in training.items()})


def test_a_run_learns_and_resumes_exactly(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    whole = train_drafter(recipe(target_folder, completions_folder, tmp_path / "whole"), callbacks=[])
    assert whole["steps"] == 40
    assert whole["held_back"]["mat"] >= 1
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().split("\n") if line]
    losses = [row["loss"] for row in log if "loss" in row]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert [row["step"] for row in log if "eval_mat" in row] == [20, 40]

    again = tmp_path / "again"
    (tmp_path / "whole").rename(again)
    for name in ("checkpoint-40", "model"):
        for file in sorted((again / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (again / name).rmdir()
    (again / "results.json").unlink()
    resumed = train_drafter(recipe(target_folder, completions_folder, again), resume=True, callbacks=[])
    assert resumed["resumed_from"] == "checkpoint-20"
    log = [json.loads(line) for line in (again / "log.jsonl").read_text().split("\n") if line]
    assert [row["loss"] for row in log if "loss" in row] == losses
    assert resumed["held_back"]["mat"] == whole["held_back"]["mat"]
    model = BlockDrafterModel.from_pretrained(again / "model")
    assert model.config.draft_vocab_size == 40

    with pytest.raises(ZerodraftError, match="already holds a run"):
        train_drafter(recipe(target_folder, completions_folder, again), callbacks=[])


def test_recomputed_states_teach_the_same(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    """As stored ones, which are rounded to float16; nothing is left on the disk, and with bfloat16 it runs too."""
    losses = {}
    for name, more in {"stored": {}, "fresh": {"recompute": True}, "half": {"recompute": True}}.items():
        settings = recipe(target_folder, completions_folder, tmp_path / name, steps=3, bf16=name == "half")
        results = train_drafter(dataclasses.replace(settings, **more), callbacks=[])
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().split("\n") if line]
        losses[name] = [row["loss"] for row in log if "loss" in row], results["held_back"]["mat"]
    assert losses["fresh"][0] == pytest.approx(losses["stored"][0], rel=1e-3)
    assert losses["half"][0] == pytest.approx(losses["stored"][0], rel=0.03)
    assert losses["fresh"][1] == pytest.approx(losses["stored"][1], rel=0.05)
    assert not (tmp_path / "fresh" / "features").exists()
    with pytest.raises(ZerodraftError, match="stores no hidden states"):
        dataclasses.replace(settings, recompute=True, cached_only=True)


@torch.no_grad()
def test_fresh_states_are_the_stored_ones(features: FeatureCache, target: LlamaForCausalLM) -> None:
    fresh = FreshFeatures(target, features.completions, features.taps)
    for indices in ([3], [3, 8, 1]):
        for row, index in enumerate(indices):
            stored = features[index]
            assert torch.allclose(fresh.batch(indices)[row, : len(stored)], stored, rtol=2e-3, atol=2e-3)


def test_a_drafter_can_go_on_with_fewer_slots(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    """The first ones, as they were; asked for more it keeps those that it has."""
    train_drafter(recipe(target_folder, completions_folder, tmp_path / "before", steps=1), callbacks=[])
    settings = recipe(target_folder, completions_folder, tmp_path / "after", steps=1, learning_rate=1e-9)
    start = dataclasses.replace(settings.drafter, start=str(tmp_path / "before" / "model"))
    for slots, kept in ((3, 3), (7, 4)):
        shape = dataclasses.replace(start, block_size=slots)
        out = str(tmp_path / f"after-{slots}")
        train_drafter(dataclasses.replace(settings, drafter=shape, out=out), callbacks=[])
        old, new = (BlockDrafterModel.from_pretrained(path) for path in (start.start, f"{out}/model"))
        assert new.config.block_size == kept
        weights, size = old.state_dict(), kept * old.norm.weight.numel()
        for name, weight in new.state_dict().items():
            expected = weights[name][:size] if name.startswith("slots.") else weights[name]
            assert torch.allclose(weight, expected, atol=1e-6)


def test_bfloat16_reaches_the_loss(
    target_folder: Path, completions_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast the products with the LM head are rounded too, and the loss stays nearly the same; no flag says
    that this machine has nothing but a CPU."""
    losses, types = {}, {}

    def watched(logits: torch.Tensor, *goal: Any) -> torch.Tensor:
        types[bf16] = logits.dtype
        return block_loss(logits, *goal)

    monkeypatch.setattr("zerodraft.training.drafters.block.block_loss", watched)
    for bf16 in (False, True):
        out = tmp_path / str(bf16)
        train_drafter(recipe(target_folder, completions_folder, out, steps=1, bf16=bf16), callbacks=[])
        losses[bf16] = json.loads((out / "log.jsonl").read_text().split("\n")[0])["loss"]
    assert types == {False: torch.float32, True: torch.bfloat16}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_a_drafter_without_coupling_gets_one(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    before = recipe(target_folder, completions_folder, tmp_path / "before", steps=1)
    train_drafter(dataclasses.replace(before, drafter=dataclasses.replace(before.drafter, coupling=0)), callbacks=[])
    settings = recipe(target_folder, completions_folder, tmp_path / "after", steps=1, learning_rate=1e-9)
    start = dataclasses.replace(settings.drafter, start=str(tmp_path / "before" / "model"), coupling=8)
    train_drafter(dataclasses.replace(settings, drafter=start), callbacks=[])
    old, new = (BlockDrafterModel.from_pretrained(tmp_path / name / "model") for name in ("before", "after"))
    assert old.coupling is None
    assert new.config.coupling == 8
    weights = new.state_dict()
    assert set(weights) - set(old.state_dict()) == {name for name in weights if name.startswith("coupling.")}
    assert all(torch.allclose(weights[name], weight, atol=1e-6) for name, weight in old.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.anchors", 0),
        ("loss.decay", 0),
        ("drafter.block_size", 0),
        ("drafter.layers", 0),
        ("drafter.draft_vocab", -1),
        ("held_back.sequences", 0),
        ("training.steps", 0),
        ("training.batch_size", 0),
        ("training.learning_rate", float("nan")),
    ],
)
def test_settings_that_train_nothing(key: str, value: float) -> None:
    with pytest.raises(ZerodraftError, match=key.replace(".", r"\.") + " is"):
        read_recipe(DrafterRecipe, None, {"target": "x", "data": ["y"], "out": "z", key: value})


def test_a_batch_of_more_sequences_than_there_are(
    target_folder: Path, completions_folder: Path, tmp_path: Path
) -> None:
    settings = recipe(target_folder, completions_folder, tmp_path / "run", batch_size=21)
    with pytest.raises(ZerodraftError, match="only 20 to train on"):
        train_drafter(settings, callbacks=[])
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_damaged_target_is_one_sentence(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(target_folder, damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ZerodraftError, match="could not be loaded"):
        train_drafter(recipe(damaged, completions_folder, tmp_path / "run"), callbacks=[])


def test_only_cached_completions(target_folder: Path, completions_folder: Path, tmp_path: Path) -> None:
    settings = recipe(target_folder, completions_folder, tmp_path / "run", steps=2)
    with pytest.raises(ZerodraftError, match="hidden states of only 0 completions"):
        train_drafter(dataclasses.replace(settings, cached_only=True), callbacks=[])
