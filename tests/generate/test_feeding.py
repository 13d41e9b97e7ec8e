"""What a model changes about a decoding step is not passed over: the same tokens, or one error that names it."""

from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from tests.decoding.generating import NEW, prompts_of, spec_for
from tests.ztt.tiny import SIZES, base_config, randomise, tiny_plain
from zerodraft import ZerodraftError

PREPARE = "prepare_inputs_for_generation"


class Shifted(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] + 9}


class Late(LlamaForCausalLM):
    """Changes nothing until the text is long."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] * 2} if input_ids.shape[1] > 20 else inputs


class Forgetful(LlamaForCausalLM):
    """Hides the first token of every text."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = torch.ones_like(args[0])
        mask[:, 0] = 0
        return {**inputs, "attention_mask": mask}


class Tagged(LlamaForCausalLM):
    """Gives its forward pass something more."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "scale": 0.5}

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        logits: Any = out.logits
        out.logits = logits * scale + torch.arange(logits.shape[-1]) * (1 - scale)
        return out


class Growing(LlamaForCausalLM):
    """Carries a number from step to step."""

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        made = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return {**made, "step": made.get("step", 0) + 1}

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, step: int = 0, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.roll(step, -1)
        return out


class OwnLoop(LlamaForCausalLM):
    def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super()._sample(input_ids, **kwargs).flip(-1)


class Harmless(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name != "use_cache"} | {"use_cache": True}


def made(kind: type[LlamaForCausalLM]) -> Any:
    torch.manual_seed(0)
    model = kind(base_config("llama")).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [Shifted, Late, Forgetful, Tagged, Growing, OwnLoop])
def test_what_a_class_changes_is_named(kind: type[LlamaForCausalLM], rows: int, make_target: Any) -> None:
    model, batch = made(kind), prompts_of(rows)
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    answers = tiny_plain("llama").generate(**batch, **options)
    spec = spec_for(answers, batch["attention_mask"], make_target=make_target)
    with pytest.raises(ZerodraftError, match=r"leave out custom_generate") as told:
        model.generate(**batch, **options, custom_generate=spec)
    name = {Growing: "_update_model_kwargs_for_generation", OwnLoop: "_sample"}.get(kind, f"{kind.__name__}.{PREPARE}")
    assert name in str(told.value)


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [Harmless, Late])
def test_what_changes_nothing_is_drafted(kind: type[LlamaForCausalLM], rows: int, make_target: Any) -> None:
    model, batch = made(kind), prompts_of(rows)
    options = {"max_new_tokens": 20 - batch["input_ids"].shape[1], "do_sample": False, "eos_token_id": None}
    plain = model.generate(**batch, **options)
    spec = spec_for(plain, batch.get("attention_mask"), make_target=make_target)
    assert torch.equal(plain, model.generate(**batch, **options, custom_generate=spec))
    assert spec.last_stats.accepted > 0


def test_a_method_that_was_put_on_the_model_counts() -> None:
    model, batch = tiny_plain("llama"), prompts_of(1)
    usual = model.prepare_inputs_for_generation
    setattr(model, PREPARE, lambda *args, **kwargs: {**usual(*args, **kwargs), "position_ids": None})
    with pytest.raises(ZerodraftError, match="position_ids"):
        model.generate(**batch, max_new_tokens=4, custom_generate=spec_for(batch["input_ids"]))


def test_hooks_of_forward_passes_run() -> None:
    model, batch = tiny_plain("llama"), prompts_of(1)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    untouched = model.generate(**batch, **options)

    def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * torch.linspace(0.2, 2.0, output.shape[-1])

    model.model.layers[1].mlp.register_forward_hook(scaled)
    plain = model.generate(**batch, **options)
    assert not torch.equal(plain, untouched)
    for make_target in ("auto", None):
        spec = spec_for(plain, make_target=make_target)
        assert torch.equal(plain, model.generate(**batch, **options, custom_generate=spec))


def test_phi3_is_drafted_and_its_second_reading_of_a_text_is_told() -> None:
    """Its method computes the whole cache anew where the long factors begin."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    ropes = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**SIZES, rope_parameters=ropes, original_max_position_embeddings=16)).eval()
    randomise(model)
    batch = prompts_of(1)
    for new, crosses in ((8, False), (20, True)):
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        plain = model.generate(**batch, **options)
        if crosses:
            with pytest.raises(ZerodraftError, match=rf"Phi3ForCausalLM\.{PREPARE}"):
                model.generate(**batch, **options, custom_generate=spec_for(plain))
        else:
            assert torch.equal(plain, model.generate(**batch, **options, custom_generate=spec_for(plain)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_virtual_tokens_are_refused_and_lora_is_not() -> None:
    peft = pytest.importorskip("peft")
    batch = prompts_of(1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    for config in (
        peft.PromptTuningConfig(**virtual),
        peft.PrefixTuningConfig(**virtual),
        peft.PromptEncoderConfig(**virtual, encoder_hidden_size=16),
    ):
        model = peft.get_peft_model(tiny_plain("llama"), config).eval()
        with pytest.raises(ZerodraftError, match=rf"PeftModelForCausalLM\.{PREPARE}"):
            model.generate(**batch, **options, custom_generate=spec_for(batch["input_ids"]))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_plain("llama"), lora).eval()
    plain = model.generate(**batch, **options)
    for make_target in ("auto", None):
        spec = spec_for(plain, make_target=make_target)
        assert torch.equal(plain, model.generate(**batch, **options, custom_generate=spec))


SMALL = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
MISFITS: dict[str, Any] = {
    "GPT-1": (lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**SMALL)), "leave out custom_generate"),
    "XLM": (
        lambda: XLMWithLMHeadModel(
            XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, mask_token_id=3, use_lang_emb=False)
        ),
        "leave out custom_generate",
    ),
    "XLNet": (
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)),
        "leave out custom_generate",
    ),
    "Falcon with ALiBi": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
        ),
        "alibi=True",
    ),
}


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("name", MISFITS)
def test_families_whose_passes_cannot_be_drafted_are_told(name: str, make_target: Any) -> None:
    make, sentence = MISFITS[name]
    model, batch = make().eval(), prompts_of(1)
    spec = spec_for(batch["input_ids"], make_target=make_target)
    with pytest.raises(ZerodraftError, match=sentence):
        model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0, custom_generate=spec)


@pytest.mark.parametrize("name", ["ctrl", "phimoe"])
def test_families_with_a_method_that_feeds_the_same_are_drafted(name: str) -> None:
    torch.manual_seed(0)
    if name == "ctrl":
        model = CTRLLMHeadModel(CTRLConfig(**SMALL, dff=48)).eval()
    else:
        model = PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=2)).eval()
    randomise(model)
    batch = prompts_of(1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**batch, **options)
    spec = spec_for(plain)
    assert torch.equal(plain, model.generate(**batch, **options, custom_generate=spec))
    assert spec.last_stats.accepted > 0
