"""DFlash drafters: our network against transformers' own, and decoding against the network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DFlashCache

from tests.drafters.driving import drafts
from tests.drafters.tiny_dflash import (
    MASK,
    SIZES,
    SLIDING,
    TARGETS,
    draft_once,
    draft_plainly,
    make,
    states,
    transformers_model,
)
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_model import (
    default_taps,
    dflash_from_target,
    visible,
)
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.caches import CACHE


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
        **{CACHE: cache},
    ).last_hidden_state[0, 1:]
    embedding = target.get_input_embeddings().weight[noise[:, :1]]
    ours = drafter(taps, torch.ones(1, 40, dtype=torch.bool), torch.tensor([[39]]), embedding)[0, 0]
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("changes", [{}, SLIDING, {**SLIDING, "causal_sliding": False}], ids=["full", "causal", "both"])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_decoding_agrees_with_the_network(family: str, changes, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through several steps that accept different numbers, past the first size of the cache, two rows at once; and with
    attention over the whole cache, as on a GPU."""
    if whole:
        monkeypatch.setattr("zerodraft.drafters.dflash.reach", lambda device, end, positions: positions)
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


def test_windows_element_by_element() -> None:
    queries, keys = torch.tensor([[7, 8]]), torch.arange(12)[None]
    assert visible(queries, keys, None, True) is None
    for causal in (True, False):
        seen = visible(queries, keys, 3, causal)
        assert seen is not None
        for i, q in enumerate((7, 8)):
            for k in range(12):
                assert seen[0, i, k] == (q - 3 < k <= q if causal else abs(q - k) <= 3)


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


def test_offloaded_embeddings_are_refused() -> None:
    target, drafter = make()
    target.lm_head.to("meta")
    with pytest.raises(ZerodraftError, match="offloaded"):
        DFlashDrafter(drafter, target)
