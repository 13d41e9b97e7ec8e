"""TRL's `SFTTrainer` on a Zero Token Transformer: every way of training gives the base family's loss and trains gates.

TRL computes its loss from `base_model` and the weights of the LM head, in tiles, so a `base_model` that leaves the
cycles out trains another model than the one that is saved.
"""

from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="needs TRL")
peft = pytest.importorskip("peft", reason="needs PEFT")

import torch  # noqa: E402  # after the skip
from datasets import Dataset  # noqa: E402  # after the skip
from transformers import AutoModelForCausalLM  # noqa: E402  # after the skip

from tests.saved import TEXT, tiny_llama, tiny_tokenizer  # noqa: E402  # after the skip
from tests.ztt.tiny import open_gates, randomise  # noqa: E402  # after the skip
from zerodraft import ZttForCausalLM  # noqa: E402  # after the skip
from zerodraft.ztt.convert import from_base  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and PEFT's own, of releases that come after ours

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
TALK = [{"role": "user", "content": "who sat on the mat?"}, {"role": "assistant", "content": "the cat sat on the mat."}]
DATA: dict[str, dict[str, list[Any]]] = {
    "text": {"text": [TEXT, TEXT[:40], TEXT[10:], TEXT[:60]] * 2},
    "completions": {"prompt": ["the cat ", "once upon "] * 4, "completion": ["sat on the mat.", "a time"] * 4},
    "messages": {"messages": [TALK] * 8},
}
OWN_PARTS = ["zero_tokens", "cycle_gates"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("text", {}),
    "packing": ("text", {"packing": True, "max_length": 48}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
    "lora": ("text", {"modules_to_save": OWN_PARTS}),
    "checkpointing": ("text", {"gradient_checkpointing": True}),
    "lora-checkpointing": ("text", {"gradient_checkpointing": True, "modules_to_save": OWN_PARTS}),
    "completion-only": ("completions", {"completion_only_loss": True}),
    "assistant-only": ("messages", {"assistant_only_loss": True}),
    "bf16": ("text", {"bf16": True}),
    "dft": ("text", {"loss_type": "dft"}),
    "smoothing": ("text", {"label_smoothing_factor": 0.1}),
    "accumulation": ("text", {"gradient_accumulation_steps": 2}),
}


def plain_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama(tokenizer))
    randomise(model)
    return model


def trained(model: Any, tokenizer: Any, folder: Path, kind: str, options: dict[str, Any]) -> tuple[Any, list[float]]:
    """The model after two steps of `SFTTrainer`, and the losses it logged."""
    options = dict(options)
    names = options.pop("modules_to_save", None)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM")
    fixed = {"bf16": False, "gradient_checkpointing": False, "max_length": 128}
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **fixed | options,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict(DATA[kind]),
        processing_class=tokenizer,
        peft_config=adapter if names is not None else None,
    )
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_model_trains_like_its_base_and_opens_its_gates(variant: str, tmp_path: Path) -> None:
    kind, options = VARIANTS[variant]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    plain = plain_model(tokenizer)
    deep = from_base(plain, cycles=2)
    before = deep.base.state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    theirs = {name: value for name, value in options.items() if name != "modules_to_save"}
    if "modules_to_save" in options:
        theirs["modules_to_save"] = []
    _, expected = trained(plain, tokenizer, tmp_path / "plain", kind, theirs)
    trainer, losses = trained(deep, tokenizer, tmp_path / "deep", kind, options)
    assert losses[0] == pytest.approx(expected[0], rel=1e-2 if variant == "bf16" else 1e-4)
    assert deep.cycle_gates is not None
    assert bool((deep.cycle_gates().detach() != 0).all()), "the gates have not moved"
    if "modules_to_save" not in options:
        assert not torch.equal(deep.base.state_dict()["model.layers.1.mlp.up_proj.weight"], before)
        trainer.save_model(str(tmp_path / "saved"))
        again = ZttForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(again.cycle_gates.weight, deep.cycle_gates.weight)


def test_the_fused_loss_is_the_models_own(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    deep = from_base(plain_model(tokenizer), cycles=3)
    open_gates(deep, 0.7)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(deep.eval()(ids, labels=ids).loss)
    data = {"text": [TEXT] * 2}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, save_strategy="no")
    trainer = trl.SFTTrainer(
        deep,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        eval_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.05)  # TRL ends the text with one more token
