"""Replayed drafts: the tokens are those that were written, right drafts save passes, only the made-up costs count."""

import numpy as np
import torch

import replay
from tests.ztt.tiny import tiny_plain
from zerodraft.decoding.lattice import Lattice


def test_what_is_known_is_replayed() -> None:
    model, prompt = tiny_plain("llama"), torch.tensor([5, 9, 2])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(prompt[None], **options)[0, 3:].tolist()
    model.generation_config.eos_token_id = None
    found = {}
    for right in (True, False):
        text = replay.Written(prompt, tokens, {})
        for at in range(len(tokens)):
            ids = np.array([tokens[at + 1 :][:4]]).T + (not right)
            text.lattices.append(Lattice(ids, np.full(ids.shape, -0.1, np.float32)) if len(ids) else Lattice.empty())
        source = replay.Replay(4, 0.001, lambda nodes: 0.02, model.config.vocab_size)
        found[right] = replay.replay(model, [text] * 5, source, explore=48, slack=0.03)
    assert found[True]["mat"] > 2.5
    assert found[True]["modelled_speedup"] > 2
    assert found[False]["mat"] < found[True]["mat"]
