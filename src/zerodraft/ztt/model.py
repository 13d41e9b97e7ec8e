"""`ZttForCausalLM` and `ZttModel`: any decoder family of transformers, its middle layers run several times.

The model contains the family's own model (`.base`), built from its own configuration, with its list of layers turned
into a `CycledLayers`; besides that it owns `OWN_PARTS` (zero tokens, cycle gates, ...) and nothing else. Keys of saved
weights are the family's behind `base.`, plus those of these parts. A shared layer exists once: there is nothing to tie.

`ZttForCausalLM.model` is the same decoder without its head, as `LlamaForCausalLM.model` is: a `ZttModel` over the very
modules. It is no submodule, so that parameters and state dict have everything once.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.caches import check_takes_cache, for_return, the_one
from zerodraft.ztt.cycling import CycleOptions, CycleRun
from zerodraft.ztt.exits import ExitPolicy, ExitRule, check_policy
from zerodraft.ztt.families import build_family
from zerodraft.ztt.pretrained import OWN_PARTS, ExitRecord, ZttPreTrainedModel

# Arguments of the loss alone; the family would hand them down to the attention of every layer.
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


@dataclass
class ZttCausalLMOutput(CausalLMOutputWithPast):
    """Output of `ZttForCausalLM`.

    Attributes:
        hidden_states: The embeddings, then what each executed layer returns (without gate and without what goes on
            between cycles); the last is after the final norm.
        attentions: One for each executed layer, with eager attention; what a row lacks to 1 lies on the zero token.
        hidden_states: None in place of those that `output_hidden_states` did not choose.
        cycle_losses: `(cycles,)`, loss of each cycle's readout, with `cycle_weights`.
        zero_mass: `(b, t, cycles with zero tokens, shared layers, heads)`, with `output_zero_mass`.
        exit_depth: `(b, t)`, cycles that each token ran (0: padding), with an exit rule.
    """

    hidden_states: tuple[Tensor | None, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # as theirs
    cycle_losses: Float[Tensor, " cycles"] | None = None
    zero_mass: Float[Tensor, "b t cycles layers heads"] | None = None
    exit_depth: Int[Tensor, "b t"] | None = None


class ZttModel(ZttPreTrainedModel):
    """The decoder without a language modelling head; loads the checkpoints of `ZttForCausalLM`."""

    _keys_to_ignore_on_load_unexpected = [r"^base\.(lm_head|embed_out)\."]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        family = build_family(AutoModel, self._base_config())
        # The name under which the family's model with a head holds this one, so that the state-dict keys agree.
        self._base_name = family.base_model_prefix
        self._attach(nn.ModuleDict({self._base_name: family}), family)

    @classmethod
    def _of(cls, model: "ZttForCausalLM") -> "ZttModel":
        """A decoder for `_follow`: made of a model's modules, none of its own."""
        decoder = cls.__new__(cls)
        ZttPreTrainedModel.__init__(decoder, model.config)
        decoder._base_name = model._base_name
        decoder._parts = replace(model._parts, path=model._parts.path.removeprefix(f"{decoder._base_name}."))
        decoder._plan, decoder._cycled_path = model._plan, model._cycled_path
        decoder.all_tied_weights_keys = {}
        return decoder

    def _follow(self, model: "ZttForCausalLM") -> None:
        """Take over the modules that the model has now (adapters may have replaced some), and its mode."""
        self.base = nn.ModuleDict({self._base_name: model.base.get_submodule(self._base_name)})
        for name in OWN_PARTS:
            setattr(self, name, getattr(model, name))
        self._slot_hooks = model._slot_hooks
        self.training = model.training

    @property
    def family(self) -> PreTrainedModel:
        return self.base.get_submodule(self._base_name)  # pyright: ignore[reportReturnType]  # put there by __init__

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b t e"] | None = None,
        use_cache: bool | None = None,
        cycles: int | None = None,
        exit_depth: Int[Tensor, "b t"] | None = None,
        exit_rule: ExitRule | None = None,
        exit_policy: ExitPolicy = "propagate",
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, `(b, t, d)`; the arguments are those of `ZttForCausalLM.forward`."""
        out, run = self._cycle(
            CycleOptions(cycles=cycles, depth=exit_depth, rule=exit_rule, policy=exit_policy),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=the_one(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **for_return(run.cache),
        )


class ZttForCausalLM(ZttPreTrainedModel, GenerationMixin):
    """A causal language model with head, cycled middle layers and tail."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        family = build_family(AutoModelForCausalLM, self._base_config())
        self._base_name = family.base_model_prefix
        self._attach(family, family)
        self.generation_config = GenerationConfig.from_model_config(self.config.family)

    @property
    def family(self) -> PreTrainedModel:
        return self.base  # pyright: ignore[reportReturnType]  # put there by __init__

    @property
    def model(self) -> ZttModel:
        """The cycled decoder without the LM head; it shares all its modules with this model."""
        if "_decoder" not in self.__dict__:
            self.__dict__["_decoder"] = ZttModel._of(self)  # past nn.Module, which would make a submodule of it
        decoder = self.__dict__["_decoder"]
        decoder._follow(self)
        return decoder

    def get_output_embeddings(self) -> nn.Module | None:
        return self.family.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.family.set_output_embeddings(new_embeddings)

    @classmethod
    def from_base(cls, model_or_name: Any, **options: Any) -> "ZttForCausalLM":
        """Turn a pretrained model of a decoder family into a Zero Token Transformer: see `zerodraft.ztt.convert`."""
        from zerodraft.ztt.convert import from_base

        return from_base(model_or_name, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b t e"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cycles: int | None = None,
        cycle_weights: Sequence[float] | None = None,
        distil_cycles: bool = False,
        exit_depth: Int[Tensor, "b t"] | None = None,
        exit_rule: ExitRule | None = None,
        exit_policy: ExitPolicy = "propagate",
        output_zero_mass: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ZttCausalLMOutput:
        """Logits of the next token.

        Args:
            input_ids: Tokens; or `inputs_embeds`.
            attention_mask: `(b, s)` with 0 for padding, or what the family takes beyond that.
            position_ids: Positions, counted from the cache's length unless given.
            past_key_values: Any transformers cache with `config.num_hidden_layers` slots; `cache` is the same.
            inputs_embeds: Embeddings instead of tokens.
            labels: Targets, shifted here; -100 is ignored.
            use_cache: Fill a cache (default: `config.use_cache`, and not in training).
            logits_to_keep: Last positions, or indices, whose logits are wanted; 0 for all.
            cycles: Run only this many cycles, for every token.
            cycle_weights: One weight per cycle; the loss is the weighted mean over the readouts after each cycle (each
                through the tail), the logits are those of the last.
            distil_cycles: With `cycle_weights`: every readout but the last learns the last one's distribution, which is
                held fixed, instead of the labels (self-distillation, Zhang et al. 2019, arXiv:1905.08094).
            exit_depth: Cycles of each token (from 1); every layer is run and the result selected. Differentiable.
            exit_rule: Early exit, decided after each cycle; see `zerodraft.ztt.exits`.
            exit_policy: Keys and values of exited tokens in deeper cycles: from the frozen state (`propagate`), or
                their latest cycle's (`latest`).
            output_zero_mass: Return the attention mass on the zero tokens.
            **kwargs: Arguments of the family's forward pass and of the loss (`shift_labels`, `ignore_index`,
                `num_items_in_batch`).

        Raises:
            ZerodraftError: options that exclude each other, an empty prompt, a cache that does not fit.
        """
        if distil_cycles and cycle_weights is None:
            raise ZerodraftError("distil_cycles=True needs cycle_weights, which say how the readouts count.")
        if cycle_weights is not None and (labels is None or len(cycle_weights) != (cycles or self.config.cycles)):
            raise ZerodraftError(f"cycle_weights={list(cycle_weights)} needs labels and one weight for each cycle run.")
        loss_kwargs = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        options = CycleOptions(
            cycles=cycles,
            every_cycle=cycle_weights is not None,
            keep_mass=output_zero_mass,
            depth=exit_depth,
            rule=exit_rule,
            policy=exit_policy,
        )
        out, run = self._cycle(
            options,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=the_one(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=False if cycle_weights is not None else use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        logits, loss, cycle_losses = out.logits, None, None
        if labels is not None:
            vocabulary = self.config.vocab_size
            readouts = [*self._shallower_logits(run, logits_to_keep), logits]
            losses = [self.loss_function(x, labels, vocabulary, **loss_kwargs, **kwargs) for x in readouts]
            logits, loss = readouts[-1], losses[-1]
            if distil_cycles:
                losses = [*(soft_loss(x, logits, labels, **loss_kwargs) for x in readouts[:-1]), loss]
            if cycle_weights is not None:
                stacked = torch.stack(losses)
                weights = stacked.new_tensor(cycle_weights)
                loss, cycle_losses = stacked @ weights / weights.sum(), stacked.detach()
        return ZttCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cycle_losses=cycle_losses,
            zero_mass=self._stack_mass(run),
            exit_depth=run.exit_depth,
            **for_return(run.cache),
        )

    def _shallower_logits(self, run: CycleRun, logits_to_keep: int | Tensor) -> list[Tensor]:
        """Logits after each number of cycles but the last, with `cycle_weights`."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = [hidden[:, kept] for hidden in run.shallower]
        return [self.readout(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]) for hidden in states]

    @contextmanager
    def _exits(self, rule: ExitRule | None, policy: ExitPolicy):
        """Early exit in every forward pass of this model within the context; `last_exit` is kept up to date."""
        self.last_exit = None
        if rule is None:
            yield
            return
        check_policy(policy)
        with ExitRecord(self, rule, policy).holds():
            yield

    def generate(
        self, *args: Any, exit_rule: ExitRule | None = None, exit_policy: ExitPolicy = "propagate", **kwargs: Any
    ) -> Any:
        """transformers' `generate` with early exit.

        Args:
            exit_rule: Decides after each cycle which tokens stop; None runs all cycles.
            exit_policy: See `forward`.

        Meanwhile and afterwards `last_exit` holds the depth `(b, t)` of every position (0: padding, or computed by an
        earlier call), in the rows that the model saw (with beam search: the beams). The last token of a text has not
        been computed and has none. `zerodraft.ztt.streamer` pairs tokens with depths as they come.
        """
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(given, Tensor) and given.shape[-1] == 0 and kwargs.get("inputs_embeds") is None:
            raise ZerodraftError("The prompt is empty; give at least one token.")
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("custom_generate") is None and kwargs.get("use_cache", getattr(settings, "use_cache", True)):
            check_takes_cache(self)
        with self._exits(exit_rule, exit_policy):
            # pyright takes the protocol that `generate` annotates its self with for a class that we are not.
            out = super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.last_exit is not None and "inputs_embeds" not in kwargs:
            # Assisted decoding ends with guesses that it computed and then rejected: no positions of the text.
            text = out if isinstance(out, Tensor) else out.sequences
            self.last_exit = self.last_exit[:, : text.shape[1] - 1]
        return out


def soft_loss(
    logits: Float[Tensor, "b t v"],
    teacher: Float[Tensor, "b t v"],
    labels: Int[Tensor, "b t"],
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross entropy of readouts with a teacher's distribution, which gets no gradient, at the positions where
    transformers' causal loss counts a label; the arguments are that loss's."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    counted = shift_labels != ignore_index
    probabilities = teacher.detach().float().softmax(-1)
    losses = -(probabilities * logits.float().log_softmax(-1)).sum(-1)
    return losses.where(counted, 0).sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
