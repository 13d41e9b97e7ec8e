"""The autoregressive drafter: with its caches rolled back and forth it drafts what it would draft from scratch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.ztt.tiny import VOCABULARY, base_config, tiny, tiny_plain
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Drafter, DraftSession, Progress
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.generate.huggingface import DiffuSpec

CPU = torch.device("cpu")


def progress(*rows: list[int]) -> list[Progress]:
    return [Progress(torch.tensor(row, dtype=torch.int64), None) for row in rows]


@torch.no_grad()
def from_scratch(model: Any, text: list[int], length: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Without a cache: the whole text through the model for each token."""
    text, rows = list(text), []
    for _ in range(length):
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        rows.append(torch.log_softmax(logits.float(), -1).topk(candidates))
        text.append(int(rows[-1].indices[0]))
        if text[-1] == 2:
            break
    return torch.stack([r.indices for r in rows]).numpy(), torch.stack([r.values for r in rows]).numpy()


MODELS = {"llama": tiny_plain(), "mistral": tiny_plain("mistral"), "gpt2": tiny_plain("gpt2"), "ztt": tiny()}


@settings(deadline=None, max_examples=12)
@given(data=st.data(), family=st.sampled_from(sorted(MODELS)))
def test_drafts_are_those_from_scratch_whatever_was_accepted(data: st.DataObject, family: str) -> None:
    model = MODELS[family]
    drafter = AutoregressiveDrafter(model, candidates=3, max_length=5)
    session = drafter.start(2, CPU, None)
    some = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9)
    texts = [data.draw(some), data.draw(some)]
    session.observe(progress(*texts))
    for _ in range(4):
        lengths = [data.draw(st.integers(0, 6)) for _ in texts]
        news = []
        for text, length, lattice in zip(texts, lengths, session.propose(lengths), strict=True):
            if not length:
                assert len(lattice) == 0
                news.append(data.draw(st.sampled_from([[], [5]])))
                continue
            ids, log_q = from_scratch(model, text, min(length, 5), 3)
            assert lattice.chain
            assert not lattice.drawn
            assert lattice.ids[:, 0].tolist() == ids[:, 0].tolist()
            assert lattice.log_q == pytest.approx(log_q, abs=1e-4)
            accepted = lattice.ids[: data.draw(st.integers(0, len(lattice))), 0].tolist()
            # the target's own token may be the one that was drafted next (a draft that was cut short)
            following = lattice.ids[len(accepted), 0] if len(accepted) < len(lattice) else 7
            news.append([*accepted, data.draw(st.sampled_from([int(following), 9]))])
        session.observe(progress(*news))
        texts = [text + new for text, new in zip(texts, news, strict=True)]


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_always_right_about_itself(family: str) -> None:
    model = MODELS[family]
    decode = DiffuSpec(AutoregressiveDrafter(model, candidates=1), length=FixedLength(4))
    ids = torch.tensor([[3, 4, 5]])
    given, same = (
        model.generate(ids, max_new_tokens=20, do_sample=False, **by) for by in ({"custom_generate": decode}, {})
    )
    assert torch.equal(given, same)
    stats = decode.last_stats
    assert stats is not None
    assert stats.tried_at == stats.accepted_at
    assert stats.drafted == stats.accepted > 0


def test_it_is_a_drafter_and_leaves_the_model_as_it_is() -> None:
    model = MODELS["llama"]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drafter = AutoregressiveDrafter(model)
    assert isinstance(drafter, Drafter)
    session = drafter.start(1, CPU, None)
    assert isinstance(session, DraftSession)
    session.observe(progress([3, 4, 5]))
    session.propose([4])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not model.training


def test_only_new_tokens_go_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_plain(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: seen.append(inputs["input_ids"].shape[1]) or forward(**inputs)
    )
    session = AutoregressiveDrafter(model).start(1, CPU, None)
    session.observe(progress([3, 4, 5, 6]))
    (lattice,) = session.propose([3])
    assert seen == [4, 1, 1]
    session.observe(progress([*lattice.ids[:, 0].tolist(), 8]))
    session.propose([2])
    assert seen == [4, 1, 1, 2, 1]


def test_a_draft_ends_with_the_end_of_text_token_and_with_the_context() -> None:
    model = tiny_plain()
    text = [3, 4, 5]
    ids, _ = from_scratch(model, text, 6, 1)
    model.generation_config.eos_token_id = [63, int(ids[1, 0])]
    session = AutoregressiveDrafter(model).start(1, CPU, None)
    session.observe(progress(text))
    (lattice,) = session.propose([6])
    assert lattice.ids[:, 0].tolist() == ids[: ids[:, 0].tolist().index(ids[1, 0]) + 1, 0].tolist()

    session = AutoregressiveDrafter(tiny_plain(max_position_embeddings=5)).start(1, CPU, None)
    session.observe(progress(text))
    assert len(session.propose([6])[0]) == 2
    session.observe(progress([4, 5, 6]))
    assert len(session.propose([6])[0]) == 0


def drawn(temperature: float, seed: int, length: int = 1) -> Lattice:
    drafter = AutoregressiveDrafter(MODELS["llama"], candidates=4, temperature=temperature)
    session = drafter.start(1, CPU, torch.Generator().manual_seed(seed))
    session.observe(progress([3, 4, 5]))
    return session.propose([length])[0]


def test_sampled_paths_follow_the_seed_and_the_candidates_probabilities() -> None:
    assert (drawn(2.0, 0, 3).ids == drawn(2.0, 0, 3).ids).all()
    lattices = [drawn(2.0, seed) for seed in range(200)]
    first = [int(lattice.ids[0, 0]) for lattice in lattices]
    ids, log_q = lattices[0].ids[0], lattices[0].log_q[0]
    p = np.exp(log_q) / np.exp(log_q).sum()
    counts = np.array([first.count(int(token)) for token in ids])
    assert counts.sum() == 200
    # chi-square with 3 degrees of freedom: 16.3 is exceeded once in a thousand times, and the seeds are fixed
    assert ((counts - 200 * p) ** 2 / (200 * p)).sum() < 16.3
    for lattice in lattices[:20]:
        assert lattice.drawn
        assert len(set(lattice.ids[0].tolist())) == 4


@pytest.mark.parametrize("size", [VOCABULARY - 40, VOCABULARY + 9])
def test_vocabularies_may_differ_in_padding(size: int) -> None:
    target = tiny_plain(vocab_size=size)
    drafter = AutoregressiveDrafter(MODELS["llama"], candidates=4, vocab_size=size)
    drafter.check(target.config)
    session = drafter.start(1, CPU, None)
    session.observe(progress([3, size - 1, 5]))  # the drafter may not know the second one
    (lattice,) = session.propose([8])
    assert len(lattice)
    assert int(lattice.ids.max()) < min(size, VOCABULARY)
    prompt, how = torch.tensor([[3, size - 1, 5]]), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = target.generate(prompt, **how)
    assert torch.equal(plain, target.generate(prompt, custom_generate=DiffuSpec(drafter), **how))


def test_what_does_not_fit_is_one_sentence() -> None:
    drafter = AutoregressiveDrafter(MODELS["llama"])
    drafter.check(base_config("gpt2"))
    for build in (
        lambda: drafter.check(base_config("llama", vocab_size=321)),
        lambda: AutoregressiveDrafter(MODELS["llama"], vocab_size=321),
    ):
        with pytest.raises(ZerodraftError, match="vocabulary has 64 tokens, the target's 321"):
            build()
    with pytest.raises(ZerodraftError, match="make it with vocab_size=60"):
        drafter.check(base_config("llama", vocab_size=60))
    with pytest.raises(ZerodraftError, match="at least 1"):
        AutoregressiveDrafter(MODELS["llama"], candidates=0)
    from transformers import MambaConfig

    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ZerodraftError, match="A mamba model cannot draft"):
        AutoregressiveDrafter(mamba)
