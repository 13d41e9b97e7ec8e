"""Drafting with a masked diffusion language model, the setting of DiffuSpec itself (arXiv 2510.02358): the text and k
mask tokens go through the network in one pass, and what may stand at each mask becomes a lattice.

More denoising steps are the usual ones of such models: of the masks that are left, each step fills in the ones whose
likeliest token is most certain and leaves the others masked. A position's candidates are those of the step that
filled it.

With the prefix cache, the keys and values of known tokens are kept from the pass that first saw them known. In a model
with full attention they would change with every token behind them, so drafts then come from an approximation (as in
Fast-dLLM, arXiv 2505.22618); what is written stays exact, since the target verifies it.

Legend: k masks, n known tokens, V vocabulary, m candidates.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.masked_formats import load_masked
from zerodraft.drafters.masked_model import MaskedModel
from zerodraft.drafters.tapped import FIRST_SLOTS, grown
from zerodraft.drafters.vocabulary import check_vocabulary_size
from zerodraft.fast.packed import PackedLinear

USUAL_LENGTH = 30
"""Positions drafted at most, where the model was not trained for a number: the published k_max."""


class MaskedDrafter:
    """A `Drafter` (see `decoding.protocols`) around a masked diffusion language model.

    Args:
        model: the network; not changed.
        vocab_size: the target's vocabulary; the model's own if not given (without its mask, where that comes last).
        steps: denoising steps S of a draft.
        prefix_cache: keep the keys and values of known tokens, which makes drafts cheap and, in a model with full
            attention, approximate.
        candidates: tokens per position in the lattice.
        max_length: most positions drafted at once.

    Raises:
        ZerodraftError: a vocabulary or numbers that do not fit.
    """

    taps: Sequence[int] = ()

    def __init__(
        self,
        model: MaskedModel,
        *,
        vocab_size: int | None = None,
        steps: int = 1,
        prefix_cache: bool = True,
        candidates: int = 16,
        max_length: int | None = None,
    ) -> None:
        config = model.config
        longest: int = (config.block_size or USUAL_LENGTH) if max_length is None else max_length
        if min(steps, candidates, longest) < 1:
            raise ZerodraftError(
                f"Masked drafts with {steps} steps, {candidates} candidates and at most {longest} positions: "
                "expected at least 1 of each."
            )
        self.model = model.eval()
        self.steps, self.prefix_cache, self.max_length = steps, prefix_cache, longest
        last_is_mask = config.mask_token_id == config.vocab_size - 1
        self.vocab_size = config.vocab_size - last_is_mask if vocab_size is None else vocab_size
        check_vocabulary_size(config.vocab_size, self.vocab_size)
        usable = min(self.vocab_size, config.vocab_size)
        self.candidates = min(candidates, usable - (config.mask_token_id < usable))

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        target: PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        own_vocabulary: bool = False,
        **options: Any,
    ) -> "MaskedDrafter":
        """Loads Dream, DiffuCoder, LLaDA, or what `zerodraft train-drafter --kind masked` wrote.

        Args:
            path: the directory, a training run's folder or a hub id.
            target: whose vocabulary and device count; only read.
            dtype: to run in; if not given, float32 on a CPU without units for bfloat16, elsewhere as stored.
            own_vocabulary: draft the model's own tokens, for a `RetokenizedDrafter` around this one.
            **options: of the class.

        Raises:
            ZerodraftError: an unknown format, a damaged checkpoint, or one that does not fit the target.
        """
        if dtype is None and target.device.type == "cpu" and not has_bfloat16_units():
            dtype = torch.float32
        model = load_masked(path, dtype)
        config: Any = target.config.get_text_config()
        drafter = cls(model, vocab_size=None if own_vocabulary else config.vocab_size, **options)
        if target.device.type != "meta":
            model.to(target.device)  # pyright: ignore[reportArgumentType]  # transformers' wrapper hides torch's types
        pack(model)
        return drafter

    def check(self, config: Any) -> None:
        """Raises `ZerodraftError` unless a target with this config has the vocabulary that the drafts are made for."""
        found = config.get_text_config().vocab_size
        if found != self.vocab_size:
            raise ZerodraftError(
                f"The masked drafter drafts for a vocabulary of {self.vocab_size} tokens, the target's has {found}: "
                "make it with vocab_size of this target, if both have one tokenizer."
            )

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "MaskedSession":
        """A session for `batch` rows."""
        return MaskedSession([_Row(self) for _ in range(batch)])


class MaskedSession:
    """The texts of one generate call. Rows are drafted one after another, so none depends on another."""

    def __init__(self, rows: "list[_Row]") -> None:
        self._rows = rows

    def observe(self, progress: Sequence[Progress]) -> None:
        """Appends what became known."""
        for row, new in zip(self._rows, progress, strict=True):
            row.observe(new.tokens)

    def rewind(self, row: int, length: int) -> None:
        """Take back all but the first `length` tokens that a row was told."""
        self._rows[row].rewind(length)

    @torch.inference_mode()
    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """A lattice for each row that wants one."""
        return [row.draft(length) for row, length in zip(self._rows, lengths, strict=True)]


class _Row:
    """One text, and how much of it is in the cache."""

    def __init__(self, drafter: MaskedDrafter) -> None:
        self._drafter, self._model = drafter, drafter.model
        self._known = torch.empty(0, dtype=torch.long, device=drafter.model.device)
        self._cached = 0
        self._cache: list[Tensor] | None = None

    def observe(self, tokens: Int[Tensor, " n"]) -> None:
        config = self._model.config
        tokens = tokens.to(self._known)
        # the target may have more rows than the drafter; nothing is known of such a token
        tokens = tokens.masked_fill(tokens >= config.vocab_size, config.mask_token_id)
        self._known = torch.cat([self._known, tokens])

    def rewind(self, length: int) -> None:
        self._known = self._known[:length]
        # as after a draft, the last known token is not cached
        self._cached = min(self._cached, max(length - 1, 0))

    def draft(self, length: int) -> Lattice:
        drafter, config = self._drafter, self._model.config
        length = min(length, drafter.max_length, config.max_position_embeddings - len(self._known))
        if length < 1 or not len(self._known):
            return Lattice.empty()
        # with as many masks as in training
        block = self._known.new_full((max(length, config.block_size),), config.mask_token_id)
        score = self._score_from_cache if drafter.prefix_cache else self._score
        log_q, ids = denoise(score, block, length, min(drafter.steps, length), drafter.candidates)
        return Lattice(ids.cpu().numpy(), log_q.cpu().numpy())

    def _score(self, block: Int[Tensor, " k"], count: int) -> Float[Tensor, "c V"]:
        """Log-probabilities of the first `count` positions of a block after the whole text, all computed anew."""
        ids = torch.cat([self._known, block])
        states = self._model(ids[None], visible=self._visible(len(self._known), len(block), 0))[0]
        return self._log_q(states[len(self._known) - self._model.config.shifted :][:count])

    def _score_from_cache(self, block: Int[Tensor, " k"], count: int) -> Float[Tensor, "c V"]:
        """The same with the cache. The last known token is never cached: its state predicts the first mask."""
        start, known = self._cached, len(self._known)
        rows = torch.cat([self._known[start:], block])
        states = self._model(
            rows[None],
            visible=self._visible(known - start, len(block), start),
            cache=self._room(known + len(block)),
            start=start,
        )[0]
        self._cached = known - 1
        return self._log_q(states[known - start - self._model.config.shifted :][:count])

    def _visible(self, known: int, masks: int, cached: int) -> Bool[Tensor, "1 1 T S"] | None:
        """Who sees whom, where that is not everybody: known tokens not what comes after them."""
        if not self._model.config.causal_prefix:
            return None
        visible = torch.ones(known + masks, cached + known + masks, dtype=torch.bool, device=self._known.device)
        visible[:known] = visible[:known].tril(cached)
        return visible[None, None]

    def _log_q(self, states: Float[Tensor, "c H"]) -> Float[Tensor, "c V"]:
        return token_log_q(self._model, states, self._drafter.vocab_size)

    def _room(self, positions: int) -> list[Tensor]:
        if self._cache is None:
            self._cache = self._model.new_cache(FIRST_SLOTS)
        self._cache = [grown(cache, positions) for cache in self._cache]
        return self._cache


def token_log_q(model: MaskedModel, states: Float[Tensor, "c H"], vocab_size: int) -> Float[Tensor, "c V"]:
    """Log-probabilities over the target's tokens, of which the mask is none."""
    logits = model.lm_head(states).float()[:, :vocab_size]
    mask = model.config.mask_token_id
    if mask < logits.shape[1]:
        logits = logits.clone()
        logits[:, mask] = -torch.inf
    return logits.log_softmax(-1)


def denoise(
    score: Callable[[Tensor, int], Tensor], block: Int[Tensor, " k"], length: int, steps: int, candidates: int
) -> tuple[Float[Tensor, "c m"], Int[Tensor, "c m"]]:
    """The candidates of the first positions of some masks, after filling them in over several steps.

    Args:
        score: log-probabilities of the first `length` positions of a block, given its tokens and `length`.
        block: the masks; filled in here.
        length: positions that are wanted; only these are filled in.
        steps: passes; each fills in an equal share of the positions, the most certain of those left.
        candidates: of each position, likeliest first.

    Returns:
        Log-probabilities and tokens.
    """
    is_open = torch.ones(length, dtype=torch.bool, device=block.device)
    log_q = torch.zeros(length, candidates, dtype=torch.float32, device=block.device)
    ids = torch.zeros(length, candidates, dtype=torch.long, device=block.device)
    for step in range(steps):
        scores, tokens = score(block, length).topk(candidates)
        log_q, ids = torch.where(is_open[:, None], scores, log_q), torch.where(is_open[:, None], tokens, ids)
        share = length * (step + 1) // steps - length * step // steps
        surest = scores[:, 0].masked_fill(~is_open, -torch.inf).topk(share).indices
        block[surest], is_open[surest] = tokens[surest, 0], False
    return log_q, ids


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself; where it does not, float32 is several times as fast."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        # older torch
        return torch.cpu._is_avx512_bf16_supported()
    return any(capabilities().get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


class _Packed(nn.Module):
    """A linear layer with its weight in the order that the CPU's kernels like best."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = PackedLinear.of(linear)

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return self.packed(x.contiguous())


def pack(model: nn.Module) -> None:
    """Replaces the linear layers of a model that is only run from now on; a device other than the CPU and other types
    than float32 keep theirs."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (
                isinstance(child, nn.Linear)
                and child.weight.device.type == "cpu"
                and child.weight.dtype == torch.float32
            ):
                setattr(parent, name, _Packed(child))
