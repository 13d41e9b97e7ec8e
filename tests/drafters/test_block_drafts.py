"""Block-diffusion drafts through `generate`: among four tokens they are accepted often, and sampled ones exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.decoding.enumerating import V
from tests.drafters.four_tokens import KINDS, check_enumerated, check_rolled, drafter_for, talkative
from tests.ztt.tiny import left_padded
from zerodraft.decoding.lengths import FixedLength
from zerodraft.drafters.block import BlockDrafter
from zerodraft.fast.lean import lean_target
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.resolve import resolve

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "smollm2-drafter"


@pytest.mark.parametrize("coupling", [0, 4])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", ["path", "tree"])
def test_greedy_tokens_are_those_of_generate(kind: str, lean: bool, coupling: int) -> None:
    target = talkative()
    generator = torch.Generator().manual_seed(3)
    padded = left_padded([torch.randint(V, (n,), generator=generator) for n in (9, 4, 6)])
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for rows in (1, 3):
        batch = {name: padded[name][:rows] for name in ("input_ids", "attention_mask")}
        plain = target.generate(**batch, **options)
        assert ((plain[:, -40:-1] != plain[:, -39:]).sum(1) > 10).all()
        spec = DiffuSpec(
            drafter_for(target, coupling),
            length=FixedLength(3),
            make_target=lean_target if lean else None,
            **KINDS[kind],
        )
        assert torch.equal(plain, target.generate(**batch, custom_generate=spec, **options))
        assert spec.last_stats is not None
        assert spec.last_stats.accepted > 5


@pytest.mark.parametrize("coupling", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_tokens_have_the_distribution_of_plain_sampling(kind: str, coupling: int) -> None:
    check_enumerated(kind, coupling)


@pytest.mark.parametrize("kind", ["sampled path", "sampled tree"])
def test_rows_of_a_batch_are_sampled_from_it_too(kind: str) -> None:
    check_rolled(kind, torch.Generator().manual_seed(0))


@pytest.mark.real_model
def test_the_shipped_drafter_writes_the_same_tokens() -> None:
    path = resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**prompt, **options)
    drafter = BlockDrafter.from_pretrained(SHIPPED, model)
    for kind in ("path", "tree"):
        spec = DiffuSpec(drafter, length=FixedLength(drafter.max_length), **KINDS[kind])
        assert torch.equal(plain, model.generate(**prompt, custom_generate=spec, **options))
        assert spec.last_stats is not None
        assert spec.last_stats.mat > 1.3
