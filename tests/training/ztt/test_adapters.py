"""LoRA on a converted model: what is trained, what is saved, and that it comes back."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.callbacks import read_log
from zerodraft.training.ztt.adapters import load_adapters
from zerodraft.training.ztt.models import build_from_start
from zerodraft.training.ztt.run import finetune, pretrain

pytest.importorskip("peft")
# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def tune(make_recipe, tmp_path):
    """`tune(...)`: the recipe of an adapter run on a deepened tiny Llama."""
    base = make_recipe("model.kind=plain", "training.steps=2", f"output={tmp_path / 'base'}")
    pretrain(base, callbacks=[])
    common = (f"model.start={tmp_path / 'base' / 'model'}", "peft.rank=2", "loss.kind=weighted", "loss.token_depths=0")
    return lambda *overrides: make_recipe(*common, *overrides)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20)[None]).logits


def test_adapters_train_and_come_back(tune):
    recipe = tune("training.steps=6")
    results = finetune(recipe, callbacks=[])
    merged = AutoModelForCausalLM.from_pretrained(Path(recipe.output) / "model")
    start = build_from_start(recipe.model)
    shared = sum(p.numel() for part in (start.zero_tokens, start.cycle_gates) for p in part.parameters())
    assert shared < results["trained_parameters"] < results["parameters"] / 2
    own = {part: sum(p.numel() for p in getattr(start, part).parameters()) for part in ("zero_tokens", "cycle_gates")}
    assert results["trained"] == {**own, "adapters": results["trained_parameters"] - shared}
    untrained = logits(start)
    adapted = load_adapters(build_from_start(recipe.model), Path(recipe.output) / "model" / "adapter")
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(merged), untrained, atol=1e-3)
    # the gates have opened
    assert merged.cycle_gates.weight.abs().min() > 0


def test_adapters_resume(tune, tmp_path):
    options = ("training.save_every=3", "training.schedule=constant")
    finetune(tune(*options, "training.steps=6", f"output={tmp_path / 'whole'}"), callbacks=[])
    finetune(tune(*options, "training.steps=3", f"output={tmp_path / 'part'}"), callbacks=[])
    finetune(tune(*options, "training.steps=6", f"output={tmp_path / 'part'}"), resume=True, callbacks=[])
    whole, part = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "part"))
    assert [row["loss"] for row in whole if row["step"] > 3 and "loss" in row] == [
        row["loss"] for row in part if row["step"] > 3 and "loss" in row
    ]


def test_unknown_target(tune):
    with pytest.raises(ZerodraftError, match="no linear module of the model is called q_prjo"):
        finetune(tune("peft.target_modules=[q_prjo]"), callbacks=[])
