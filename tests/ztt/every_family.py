"""Every decoder family of transformers, tiny and random, against one set of checks: right, or refused in a sentence.

`test_every_family.py` takes a few of them, or those that ZERODRAFT_FAMILIES names. `python -m tests.ztt.every_family`
takes all (two minutes) and writes docs/families.json and the table that docs/convert.md shows.
"""

import copy
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.ztt.tiny import gap, randomise, tokens
from zerodraft import CycleOutput, ZerodraftError, ZttConfig, ZttForCausalLM
from zerodraft.ztt.convert import to_base

# What a configuration may call its sizes; each gets those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 64),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 64),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "decoder_layers", "num_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "decoder_attention_heads", "num_heads"], 4),
    **dict.fromkeys(["head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "linear_num_key_heads", "index_n_heads"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 24),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "sliding_window", "index_head_dim"], 16),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"], 0.0),
    "num_key_value_heads": 2,
    "v_head_dim": 12,
    "first_k_dense_replace": 99,
    "num_kv_shared_layers": 0,
    "layerdrop": 0.0,
    "index_topk": 8,
    "full_attn_idxs": [1, 3],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What of a family works; the checks have passed, or what fails is refused in a sentence."""

    cycles: bool
    zero_tokens: bool = False
    ffn_gate: bool = False
    moving_zero_keys: bool = False
    early_exit: bool = False
    refusal: str = ""


def tiny_config(family: str) -> PreTrainedConfig | None:
    """A small configuration of a family, or None if this one recipe does not make it one of a plain text decoder."""
    kind = CONFIG_MAPPING[family]
    names = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    names |= {*inspect.signature(kind.__init__).parameters, *getattr(kind, "attribute_map", {})}
    sizes = {name: size for name, size in SIZES.items() if name in names}
    if "kv_lora_rank" in sizes:  # latent attention has no grouped queries
        sizes["num_key_value_heads"] = 4
    try:
        kinds = set(getattr(kind(), "layer_types", None) or [])
        if len(kinds) > 1:  # each of them, not the first alone; full attention last, as Gemma wants it
            ordered = sorted(kinds, reverse=True)
            sizes["layer_types"] = [ordered[layer % len(ordered)] for layer in range(4)]
        config = kind(**sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever a family's code says to sizes that do not fit it
        return None
    small = sum(weight.numel() for weight in model.parameters()) < 1_000_000
    return config if small and config.get_text_config() is config else None


class Checker:
    """A family's plain model, and Zero Token Transformers over it with the same weights."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self.ids = config, tokens()
        torch.manual_seed(0)
        self.plain = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        randomise(self.plain)

    def over(self, **options: Any) -> ZttForCausalLM:
        config = ZttConfig(base_config=copy.deepcopy(self.config), **options)
        # As the family itself: some have no other than eager.
        attention = self.plain.config._attn_implementation
        model = ZttForCausalLM._from_config(config, attn_implementation=attention).eval()
        randomise(model)
        model.base.load_state_dict(self.plain.state_dict())
        return model

    def same(self, ours: Tensor, expected: Tensor) -> None:
        assert gap(ours, expected) <= 1e-4 * (1 + float(expected.abs().max())), gap(ours, expected)

    def cycles(self) -> None:
        """One cycle is the family's own model, closed gates too, and more cycles the unrolled one; with a cache too."""
        expected = self.plain(self.ids).logits
        assert torch.equal(self.over(cycles=1, zero_tokens=False)(self.ids).logits, expected)
        closed = self.over(cycles=2, cycle_gates=True, zero_tokens=False)
        with torch.no_grad():
            closed.cycle_gates.weight.zero_()
        self.same(closed(self.ids).logits, expected)
        model = self.over(cycles=2, zero_tokens=False)
        with suppress(ZerodraftError):  # where layers depend on their position, the unrolled model is another one
            self.same(model(self.ids).logits, to_base(model, unroll=True)(self.ids).logits)
        self.cached(model)

    def cached(self, model: ZttForCausalLM) -> None:
        whole, past = model(self.ids, use_cache=False).logits, None
        for piece, expected in zip(self.ids.split([5, 3, 1], 1), whole.split([5, 3, 1], 1), strict=True):
            out = model(piece, past_key_values=past, use_cache=True)
            self.same(out.logits, expected)
            past = out.past_key_values

    def zero_tokens(self, ffn_gate: bool = False) -> None:
        """The fused form is the written-out one, on its own, with everything else, and with a cache."""
        model = self.over(cycles=2, ffn_gate=ffn_gate, cycle_lora_rank=2, cycle_gates=True)
        self.cached(model)
        fused = model(self.ids, output_zero_mass=True)
        model.set_attn_implementation("eager")
        written_out = model(self.ids, output_zero_mass=True)
        self.same(fused.logits, written_out.logits)
        self.same(fused.zero_mass, written_out.zero_mass)
        far = self.over(cycles=2, zero_tokens=True)
        far.zero_tokens.keys.zero_()
        assert gap(far(self.ids).logits, self.over(cycles=2, zero_tokens=False)(self.ids).logits) > 1e-6

    def ffn_gate(self) -> None:
        self.zero_tokens(ffn_gate=True)

    def moving_zero_keys(self) -> None:
        """A key that is rotated along does not see where a text begins, as little as the family does."""
        here = torch.arange(self.ids.shape[1])[None]
        plain = [self.plain(self.ids, position_ids=here + start).logits for start in (0, 7)]
        model = self.over(cycles=2, zero_rope="none")
        ours = [model(self.ids, position_ids=here + start).logits for start in (0, 7)]
        if gap(*plain) <= 1e-4:
            self.same(*ours)

    def early_exit(self) -> None:
        """Tokens that leave are those that are selected when everything is run, step by step as well."""

        def rule(out: CycleOutput) -> Tensor:
            return out.hidden[:, 0] > 0

        parts: Any = {"input_injection": True, "cycle_scales": True, "residual_streams": 2}
        model = self.over(cycles=3, zero_tokens=False, **parts)
        out = model(self.ids, exit_rule=rule)
        self.same(out.logits, model(self.ids, exit_depth=out.exit_depth).logits)


def refusal(check: Callable[[], None]) -> str:
    """The sentence in which a check's model is refused; empty if it passed."""
    try:
        check()
    except ZerodraftError as error:
        return str(error)
    return ""


@torch.no_grad()
def outcome(config: PreTrainedConfig) -> Outcome | None:
    """Check a family; None if its own model does not run."""
    try:
        checker = Checker(config)
        checker.plain(checker.ids)
    except Exception:  # sizes that do not fit each other
        return None
    if sentence := refusal(checker.cycles):
        return Outcome(False, refusal=sentence)
    checks = (checker.zero_tokens, checker.ffn_gate, checker.moving_zero_keys, checker.early_exit)
    parts = [refusal(check) for check in checks]
    return Outcome(True, *(not sentence for sentence in parts), refusal=next(filter(None, parts), ""))


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "convert.md"
PARTS = [field.name for field in fields(Outcome) if field.type in (bool, "bool")]


def sweep() -> dict[str, dict[str, Any] | None]:
    """The outcome of every family of causal language models; None for those that no small configuration is made of."""
    found: dict[str, dict[str, Any] | None] = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        config = tiny_config(family) if family in CONFIG_MAPPING else None
        result = None if config is None else outcome(config)
        found[family] = None if result is None else asdict(result)
    return found


def table(found: dict[str, dict[str, Any] | None]) -> str:
    """Families by what works in them, as a table in Markdown."""
    rows: dict[str, list[str]] = {}
    for family, result in found.items():
        missing = [] if result is None else [part for part in PARTS if not result[part]]
        if result is None:
            row = "not checked"
        elif not result["cycles"]:
            row = "refused"
        else:
            row = f"all but {', '.join(missing)}" if missing else "all"
        rows.setdefault(row.replace("_", " "), []).append(f"`{family}`")
    # What works most comes first.
    ordered = sorted(rows, key=lambda row: (row == "not checked", row == "refused", row.count(","), row))
    ordered.sort(key=lambda row: row != "all")
    return "\n".join(
        [
            "| Works | Families |",
            "| --- | --- |",
            *(f"| {row} ({len(rows[row])}) | {', '.join(rows[row])} |" for row in ordered),
        ]
    )


def main() -> None:
    """Write the result file, and the table in the page in place of the one that stands there."""
    shown = table(json.loads(RESULTS.read_text(encoding="utf-8"))["families"])
    found = sweep()
    results = {"transformers": transformers.__version__, "families": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(shown, table(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
