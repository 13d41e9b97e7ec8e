"""One cycle of tokens that are in different ones: what batches over depth ask of the lean decode path.

Legend: R places for requests, n tokens, one of each request at work, E executions of layers, S slots, H hidden size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.fast.compiled import CPU, address
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.passes import Ran, Tokens
from zerodraft.fast.lean.weights import LeanWeights


def run_depths(
    weights: LeanWeights,
    kv: Float[Tensor, "E R nk2 S D"],
    x: Float[Tensor, "n H"],
    tokens: Tokens,
    cycles: Int[Tensor, " n"],
    *,
    head_output: Float[Tensor, "n H"] | None = None,
    masses: bool = False,
) -> Ran:
    """One cycle of tokens that are in different ones.

    Args:
        weights: Of a model with stages.
        kv: The cache.
        x: The stream in front of each token's cycle. It may be overwritten.
        tokens: One of each text.
        cycles: Which cycle each one runs, from 1.
        head_output: What the head made of each, if cycles are fed with it.
        masses: Whether the masses on the zero tokens are wanted; 0 in cycles that have none.
    """
    stages, run = weights.stages, weights.run
    assert stages is not None
    if not isinstance(run, CompiledLayers):
        return in_turn(weights, kv, x, tokens, cycles, head_output=head_output, masses=masses)
    run.check_fed(head_output)
    # to the kernels each row is so many executions further on than the first cycle
    stage, shifts = stages.cycle(1), (cycles - 1) * stages.shared_layers
    found: dict[int, Tensor] = {}
    if masses and any(has_zero(weights, cycle) for cycle in range(1, stages.cycles + 1)):
        found = {i: x.new_empty(len(x), weights.heads) for i in stage}
    made = run.make_pass(x, kv, tokens, stage, head_output, 0, 0)
    made.shifts = address(shifts, (len(x),), torch.int64)
    none = run.addresses({})
    run.functions.forward(run.shape, run.pointers, made, run.masks(x, kv, tokens), none, none, run.addresses(found))
    return Ran(x, {}, list(found.values()))


def in_turn(
    weights: LeanWeights,
    kv: Tensor,
    x: Tensor,
    tokens: Tokens,
    cycles: Tensor,
    *,
    head_output: Tensor | None,
    masses: bool,
) -> Ran:
    """See `run_depths`: one cycle's tokens after the other's."""
    stages, made, found = weights.stages, torch.empty_like(x), {}
    assert stages is not None
    assert tokens.places is not None
    for cycle in cycles.unique().tolist():
        rows = (cycles == cycle).nonzero()[:, 0]
        own = tokens.pick(rows, tokens.places, tokens.texts)
        fed = None if head_output is None else head_output[rows]
        ran = weights.run.run(x[rows], kv, own, stages.cycle(cycle), head_output=fed, masses=masses)
        made[rows] = ran.x
        for place, mass in enumerate(ran.masses):
            found.setdefault(place, torch.zeros(len(x), mass.shape[1], device=CPU))[rows] = mass
    return Ran(made, {}, list(found.values()))


def has_zero(weights: LeanWeights, cycle: int) -> bool:
    """Whether the attention of a cycle has zero tokens."""
    assert weights.stages is not None
    zero = weights.layers[weights.stages.cycle(cycle).start].zero
    return zero is not None and zero.key is not None
