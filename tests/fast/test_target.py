"""A draft tree scored in one pass over a cache has the logits that the plain model gives each node's text."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MptConfig, MptForCausalLM, StaticCache

from tests.decoding.paths import path_to
from tests.ztt.tiny import FAMILIES, gap, left_padded, tiny, tiny_plain, tokens
from zerodraft import ConfidenceExit, ZerodraftError
from zerodraft.decoding.tree import DraftTree
from zerodraft.fast.target import HfTarget
from zerodraft.models.caches import CACHE

TREE = DraftTree.from_paths([[5, 6, 7, 8], [5, 9, 10], [11, 12], [5, 6, 13]])
PATH = DraftTree.path([5, 6, 7])
EMPTY = DraftTree.path([])
MODELS = [*FAMILIES, "ztt"]


def model_of(family: str, **changes: Any) -> Any:
    return tiny("qwen3") if family == "ztt" else tiny_plain(family, **changes)


def score(target: HfTarget, last: list[int], trees: list[DraftTree], taps: tuple[int, ...] = ()) -> Any:
    """One row for each tree, padded to the widest."""
    width = max(len(tree) for tree in trees) + 1
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    depth = torch.zeros_like(ids)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        n = len(tree) + 1
        ids[row, :n] = torch.tensor([last[row], *tree.tokens.tolist()])
        depth[row, :n] = torch.from_numpy(tree.depths())
        visible[row, :n, :n] = torch.from_numpy(tree.visible())
    with torch.no_grad():
        return target.score(ids, depth, visible, taps)


@torch.no_grad()
def plain(model: Any, text: list[int], **options: Any) -> Any:
    return model(torch.tensor([text]), use_cache=False, output_hidden_states=True, **options)


def check(model: Any, out: Any, row: int, text: list[int], tree: DraftTree, taps: tuple[int, ...] = ()) -> None:
    """Row `row` of a pass over `text` (which ends with the last known token) and a tree."""
    for node in range(-1, len(tree)):
        whole = plain(model, text + path_to(tree, node))
        assert gap(out.logits[row, node + 1], whole.logits[0, -1]) < 2e-5
        for at, tap in enumerate(taps):
            assert gap(out.taps[row, node + 1, at], whole.hidden_states[tap][0, -1]) < 2e-5


STEPS: list[tuple[list[DraftTree], list[list[int] | None]]] = [
    ([TREE, PATH, EMPTY], [[0, 1, 2, 3], [], []]),
    ([PATH, TREE, TREE], [[], [0, 4, 5], [6]]),
    ([EMPTY, TREE, PATH], [[], [0, 4], [0, 1, 2]]),
    ([TREE, PATH, TREE], [[6, 7], [0], []]),
    ([TREE, PATH, TREE], [[6, 7], None, []]),
    ([PATH, PATH, PATH], [[], [], []]),
]
"""What each of three rows drafts, and the nodes that it keeps; None: nothing at all, not even the last known token."""


def check_rows(model: Any, target: HfTarget, taps: tuple[int, ...] = ()) -> None:
    """Rows of a padded batch that keep different numbers of nodes."""
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 6)]
    batch = left_padded(rows)
    with torch.no_grad():
        first = target.prefill(batch["input_ids"], batch["attention_mask"].bool(), ())
    texts = [row.tolist() for row in rows]
    for row, text in enumerate(texts):
        assert gap(first.logits[row, 0], plain(model, text).logits[0, -1]) < 2e-5
    for number, (trees, kept) in enumerate(STEPS):
        last = [20 + number + row for row in range(3)]
        out = score(target, last, trees, taps)
        for row, text in enumerate(texts):
            check(model, out, row, [*text, last[row]], trees[row], taps)
        target.keep([[] if nodes is None else [0, *(node + 1 for node in nodes)] for nodes in kept])
        for row, nodes in enumerate(kept):
            if nodes is not None:
                texts[row] += [last[row], *(int(trees[row].tokens[node]) for node in nodes)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_every_node_has_the_logits_of_its_own_text(family: str, attention: str) -> None:
    model = model_of(family)
    model.set_attn_implementation(attention)
    taps = () if family == "ztt" else (0, 2, 3)
    target, prompt = HfTarget(model), tokens(1, 9)
    with torch.no_grad():
        first = target.prefill(prompt, prompt >= 0, taps)
    text = prompt[0].tolist()
    whole = plain(model, text)
    assert first.logits.shape[1] == 1
    assert gap(first.logits[0, 0], whole.logits[0, -1]) < 2e-5
    if taps:
        assert gap(first.taps[0], torch.stack([whole.hidden_states[i][0] for i in taps], 1)) < 2e-5
    # accepted: a part of a branch, nothing, a whole path, the plain step of an empty draft, a branch again
    for tree, kept in ((TREE, [0, 4]), (TREE, []), (PATH, [0, 1, 2]), (EMPTY, []), (TREE, [6, 7])):
        text.append(20 + len(text))
        out = score(target, text[-1:], [tree], taps)
        check(model, out, 0, text, tree, taps)
        target.keep([[0, *(node + 1 for node in kept)]])
        text += [int(tree.tokens[node]) for node in kept]


@pytest.mark.parametrize("family", MODELS)
def test_rows_of_a_padded_batch_keep_different_numbers(family: str) -> None:
    model = model_of(family)
    check_rows(model, HfTarget(model))


def test_a_row_that_keeps_nothing_stays_as_it_is() -> None:
    model = tiny_plain("gemma3")
    prompts = tokens(2, 6)
    target = HfTarget(model)
    texts = prompts.tolist()
    with torch.no_grad():
        target.prefill(prompts, prompts >= 0, ())
    texts[0].append(30)
    score(target, [30, 31], [PATH, PATH])
    target.keep([[0, 1, 2, 3], []])
    texts[0] += PATH.tokens.tolist()
    for text, last in zip(texts, (32, 33), strict=True):
        text.append(last)
    out = score(target, [32, 33], [TREE, TREE])
    for row in (0, 1):
        check(model, out, row, texts[row], TREE)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "ztt"])
def test_a_prompt_in_pieces_is_the_prompt(family: str) -> None:
    model = model_of(family)
    rows = [tokens(1, n, seed=n)[0] for n in (11, 3)]
    batch = left_padded(rows)
    whole, pieces = HfTarget(model), HfTarget(model)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        expected = whole.prefill(ids, mask, ()).logits
        for start in (0, 4, 8):
            out = pieces.prefill(ids[:, start : start + 4], mask[:, start : start + 4], ())
    assert gap(out.logits, expected) < 2e-5
    a, b = (score(target, [20, 21], [TREE, PATH]).logits for target in (whole, pieces))
    assert gap(a, b) < 2e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_text_can_be_handed_over_to_another_cache(family: str, kind: str) -> None:
    model, prompt = tiny_plain(family), tokens(1, 7)
    target = HfTarget(model)
    with torch.no_grad():
        target.prefill(prompt, prompt >= 0, ())
        score(target, [20], [TREE])
        target.keep([[0, 1, 5]])
        text = [*prompt[0].tolist(), 20, 5, 9]
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
        target.export(cache)
        assert cache.get_seq_length() == len(text)
        out = model(torch.tensor([[21]]), **{CACHE: cache}, position_ids=torch.tensor([[len(text)]]))
    assert gap(out.logits[0, -1], plain(model, [*text, 21]).logits[0, -1]) < 2e-5


def test_room_is_taken_at_once_or_as_needed() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 5)
    for capacity, expected in ((0, 5), (40, 40)):
        target = HfTarget(model, capacity=capacity)
        with torch.no_grad():
            target.prefill(prompt, prompt >= 0, ())
        assert target.cache.written[0].keys.shape[2] == expected
        score(target, [7], [PATH])
        assert target.cache.written[0].keys.shape[2] == max(10, capacity)


def test_exits_of_a_zero_token_transformer_do_not_depend_on_the_tree() -> None:
    model = tiny("qwen3")
    rule = ConfidenceExit(threshold=0.05)
    target = HfTarget(model, inputs={"exit_rule": rule})
    rows = [tokens(1, n, seed=n)[0] for n in (8, 5)]
    batch = left_padded(rows)
    texts = [row.tolist() for row in rows]
    depths: set[int] = set()
    with torch.no_grad():
        target.prefill(batch["input_ids"], batch["attention_mask"].bool(), ())
        for kept in ([[0, 1], []], [[], [0, 4]]):
            for text in texts:
                text.append(30)
            out = score(target, [30, 30], [TREE, PATH] if kept[0] else [PATH, TREE])
            for row, (text, tree) in enumerate(zip(texts, [TREE, PATH] if kept[0] else [PATH, TREE], strict=True)):
                for node in range(-1, len(tree)):
                    whole = plain(model, text + path_to(tree, node), exit_rule=rule)
                    assert gap(out.logits[row, node + 1], whole.logits[0, -1]) < 2e-5
                    depths |= set(whole.exit_depth[0].tolist())
            target.keep([[0, *(n + 1 for n in nodes)] for nodes in kept])
            for text, tree, nodes in zip(texts, [TREE, PATH] if kept[0] else [PATH, TREE], kept, strict=True):
                text += [int(tree.tokens[n]) for n in nodes]
    assert len(depths) > 1


def test_masks_equal_an_elementwise_oracle() -> None:
    model = tiny_plain("gemma3")
    window = model.config.sliding_window
    rows = [tokens(1, n, seed=n)[0] for n in (6, 3)]
    batch = left_padded(rows)
    target = HfTarget(model)
    with torch.no_grad():
        target.prefill(batch["input_ids"], batch["attention_mask"].bool(), ())
        score(target, [7, 7], [PATH, PATH])
    target.keep([[0, 1, 2], [0]])  # texts end at columns 9 and 7
    ends, first = (9, 7), (0, 3)
    depth = torch.from_numpy(np.stack([TREE.depths()] * 2))
    visible = torch.from_numpy(np.stack([TREE.visible()] * 2))
    made = target.masks(depth, visible)
    for b in (0, 1):
        for q in range(len(TREE) + 1):
            for column in range(9 + len(TREE) + 1):
                key = column - 9
                place = ends[b] + int(depth[b, key]) if key >= 0 else column
                seen = bool(visible[b, q, key]) if key >= 0 else first[b] <= column < ends[b]
                near = ends[b] + int(depth[b, q]) - place < window
                assert bool(made["full_attention"][b, 0, q, column]) == seen
                assert bool(made["sliding_attention"][b, 0, q, column]) == (seen and near)


def test_models_that_cannot_score_a_tree_are_named() -> None:
    flex = tiny_plain("llama")
    flex.set_attn_implementation("flex_attention")
    with pytest.raises(ZerodraftError, match=r"flex_attention.*sdpa"):
        HfTarget(flex)
    chunked = tiny_plain("llama")
    chunked.config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(ZerodraftError, match="chunked_attention"):
        HfTarget(chunked)
    alibi = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64))
    with pytest.raises(ZerodraftError, match="position_ids"):
        HfTarget(alibi)


def test_the_model_is_not_changed() -> None:
    model = tiny_plain("gemma3")
    before = (dict(vars(model)), model.config.to_dict(), [id(p) for p in model.parameters()])
    weights: list[Tensor] = [p.clone() for p in model.parameters()]
    target, prompt = HfTarget(model), tokens(1, 6)
    with torch.no_grad():
        target.prefill(prompt, prompt >= 0, ())
        score(target, [7], [TREE])
    target.keep([[0]])
    assert before == (dict(vars(model)), model.config.to_dict(), [id(p) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
