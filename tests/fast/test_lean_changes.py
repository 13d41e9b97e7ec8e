"""The lean path notices what changes in a model, and steps aside where the model does other than its class says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.ztt.tiny import gap, tiny, tiny_plain, tokens
from zerodraft import DiffuSpec, PromptLookupDrafter
from zerodraft.fast.best import best_target
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.fast.lean.weights import SMALL

OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


def scores(model: Any) -> Tensor:
    target, prompt = lean_target(model), tokens(1, 12)
    assert isinstance(target, LeanTarget)
    return target.prefill(prompt, prompt >= 0, ()).logits[0, -1]


def own_scores(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(1, 12)).logits[0, -1]


def set_all(model: Any, name: str, value: Any) -> None:
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, value)


SETTINGS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "fewer layers": ("llama", lambda model: setattr(model.config, "num_hidden_layers", 2)),
    "a shorter window": ("mistral", lambda model: setattr(model.config, "sliding_window", 3)),
    "no window": ("mistral", lambda model: setattr(model.config, "sliding_window", None)),
    "a window for all layers": ("mistral", lambda model: setattr(model.config, "sliding_window", 2)),
    "scaling of scores": ("llama", lambda model: set_all(model, "scaling", 0.9)),
    "epsilon": ("qwen3", lambda model: set_all(model, "variance_epsilon", 0.5)),
    "scaling of positions": ("llama", lambda model: set_all(model, "attention_scaling", 1.7)),
    "layers in another order": ("llama", lambda model: model.model.layers.append(model.model.layers.pop(0))),
    "frequencies": ("llama", lambda model: model.model.rotary_emb.inv_freq.mul_(0.5)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_changed_settings_are_noticed(name: str) -> None:
    family, change = SETTINGS[name]
    model = tiny_plain(family)
    before = scores(model)
    change(model)
    assert gap(scores(model), own_scores(model)) < 2e-5
    assert gap(scores(model), before) > 1e-3


def test_a_changed_zero_token_transformer_is_noticed() -> None:
    model: Any = tiny("llama", cycle_gates=True)
    before = scores(model)
    with torch.no_grad():
        model.zero_tokens.keys.data.add_(1)
    assert gap(scores(model), own_scores(model)) < 2e-5
    assert gap(scores(model), before) > 1e-3


MODULES = (["q_proj", "v_proj"], ["down_proj"], ["lm_head"], ["k_proj", "o_proj", "gate_proj", "up_proj"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"layers_to_transform": [2]}])
def test_a_merged_adapter_is_noticed(modules: list[str], more: dict[str, Any]) -> None:
    if "lm_head" in modules and more:
        pytest.skip("is in no layer")
    model = tiny_plain("llama")
    before = scores(model)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=modules, **more))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    merged: Any = tuned.merge_and_unload()
    assert merged is model
    assert gap(scores(model), own_scores(model)) < 2e-5
    assert gap(scores(model), before) > 1e-3


def test_edits_through_data_are_noticed() -> None:
    """Of a whole matrix, and of any number of a small tensor; the largest matrix has more numbers than are compared."""
    model = tiny_plain("llama", vocab_size=SMALL)
    model.lm_head.weight.data.mul_(1.001)
    scores(model)
    for name, parameter in model.named_parameters():
        before = scores(model)
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        assert gap(scores(model), own_scores(model)) < 2e-5, name
        assert gap(scores(model), before) > 1e-4, name
    gain = model.model.norm.weight
    for place in range(len(gain)):
        gain.data[place] += 1
        assert gap(scores(model), own_scores(model)) < 2e-5


def test_nothing_is_packed_twice_without_need() -> None:
    model = tiny_plain("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] = torch.nan  # not equal to itself
    first, second = lean_target(model), lean_target(model)
    assert first is not None
    assert second is not None
    assert first._weights is second._weights


def with_a_window_that_its_class_ignores() -> Any:
    return tiny_plain("llama", sliding_window=8, use_sliding_window=False)


def with_a_long_window_that_its_class_ignores() -> Any:
    return tiny_plain("llama", sliding_window=4096)


def with_a_layer_pruned() -> Any:
    model = tiny_plain("llama")
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, nn.Linear(32, 16, bias=False))
    mlp.down_proj = nn.Linear(16, 32, bias=False)
    return model


ODD = [with_a_window_that_its_class_ignores, with_a_long_window_that_its_class_ignores, with_a_layer_pruned]


@pytest.mark.parametrize("make", ODD)
def test_it_steps_aside_with_one_warning(make: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = make(), tokens(1, 20)
    assert lean_target(model) is None
    assert lean_target(model) is None  # and is not tried again
    assert len(caplog.records) == 1
    assert "own forward pass" in caplog.text
    plain = model.generate(prompt, **OPTIONS)
    assert torch.equal(model.generate(prompt, custom_generate=DiffuSpec(PromptLookupDrafter()), **OPTIONS), plain)


def norms_as_gemmas(self: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.variance_epsilon)


PATCHES: dict[str, Any] = {
    "LlamaRMSNorm.forward": norms_as_gemmas,
    "apply_rotary_pos_emb": lambda q, k, cos, sin: (q, k),
    "LlamaMLP.forward": lambda self, x: self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x)),
    "create_causal_mask": lambda **arguments: None,
}


@pytest.mark.parametrize("name", PATCHES)
def test_patched_classes_are_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As libraries do that exchange a part of transformers for one of their own."""
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{name}", PATCHES[name])
    model = tiny_plain("llama")
    assert lean_target(model) is None
    assert lean_target(model) is None
    assert len(caplog.records) == 1
    assert "away from its own" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: tiny_plain("qwen3"), lambda: tiny("llama")])
def test_sixteen_bits_are_told_once(
    dtype: torch.dtype, make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make().to(dtype)
    assert best_target(model) is None
    assert best_target(model) is None
    assert len(caplog.records) == 1
    assert str(dtype).removeprefix("torch.") in caplog.text
    assert "dtype=torch.float32" in caplog.text
    assert model.dtype == dtype
    assert isinstance(best_target(model.float()), LeanTarget)
    for other in (tiny_plain("gemma3").to(dtype), tiny_plain("llama").to(dtype).train()):
        caplog.clear()
        other.config.attention_dropout = 0.1
        assert best_target(other) is None
        assert not caplog.records  # float32 would bring nothing


HOLES = [[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1], [1] * 12]
WINDOWED: dict[str, Callable[[], Any]] = {
    "all layers": lambda: tiny_plain("mistral", head_dim=16),
    "some layers": lambda: tiny_plain(
        "qwen3", sliding_window=4, layer_types=["full_attention", "sliding_attention"] * 2
    ),
    "no layer": lambda: tiny_plain("llama"),
    "a Zero Token Transformer": lambda: tiny("mistral"),
}


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("rows", [[0], [1], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize("name", WINDOWED)
def test_holes_in_masks_count_for_windows(name: str, rows: list[int], chunk: int | None) -> None:
    model, prompt = WINDOWED[name](), tokens(len(rows), 12)
    mask = torch.tensor([HOLES[row] for row in rows])
    options = {**OPTIONS, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(prompt, **options)
    drafted = model.generate(
        prompt, custom_generate=DiffuSpec(PromptLookupDrafter()), prefill_chunk_size=chunk, **options
    )
    assert isinstance(lean_target(model), LeanTarget)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert gap(torch.stack(drafted.logits), torch.stack(plain.logits)) < 5e-5
