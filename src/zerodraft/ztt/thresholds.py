"""A threshold for each cycle: those with the least loss plus price times compute on a text, from its scores and losses.

The choice after each cycle is one of optimal stopping: stop now, or go on with what later cycles bring. A price for
compute turns a budget into one sum to minimise, and sweeping it draws the lower convex hull of what thresholds can
reach. With all other thresholds held, the best one of a cycle is found exactly: sort the tokens that get there by
their score and add up what each would gain by stopping. Thresholds depend on each other, as the earlier ones decide
who gets to the later, so this is repeated over all cycles, from the last to the first, until nothing changes: a descent
that ends where no single threshold can be improved. It starts from every fixed depth and from one threshold for all, so
it is never worse than these on the same text.

Calibrating thresholds on held-out text: Schuster et al. 2022 (CALM, arXiv:2207.07061), there one for all layers, with a
statistical bound. The descent over prices and thresholds is ours.

All scores and losses are those without exits. A token that leaves has other keys and values in deeper cycles, so what
thresholds really bring has to be measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Cuts = tuple[float | None, ...]
"""After each cycle but the last: the lowest score that stops; None where nobody stops."""

STARTS = 3
"""From how many of the best starts a descent is made."""

ENOUGH = 1e-6
"""A descent ends where a round over all cycles gains less than this, in nats a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """What each token of a text would bring after each cycle, in float64.

    Attributes:
        scores: Of a rule after each cycle but the last; minus infinity never stops.
        losses: Nats after each cycle.
        costs: Of a token that stops after each cycle, without what the rule computes.
        asking: What the rule computes for a token when it is asked once, in the unit of `costs`.
    """

    scores: Float[Tensor, "n asked"]
    losses: Float[Tensor, "n cycles"]
    costs: Float[Tensor, " cycles"]
    asking: float = 0.0

    def stops(self, cuts: Cuts) -> Int[Tensor, " n"]:
        """After which cycle each token stops, counted from 0."""
        stops = torch.full((len(self.losses),), len(cuts))
        for cycle, cut in reversed([*enumerate(cuts)]):
            if cut is not None:
                stops[self.scores[:, cycle] >= cut] = cycle
        return stops

    def loss_and_cost(self, cuts: Cuts) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Of each token."""
        stops = self.stops(cuts)
        asked = torch.tensor([cut is not None for cut in (*cuts, None)]).cumsum(0)
        return self.losses.gather(1, stops[:, None])[:, 0], (self.costs + self.asking * asked)[stops]

    def total(self, cuts: Cuts, price: float) -> float:
        """Mean loss plus price times mean cost."""
        loss, cost = self.loss_and_cost(cuts)
        return (loss + price * cost).mean().item()

    def improve(self, cuts: Cuts, cycle: int, price: float) -> Cuts:
        """The best cut after one cycle (from 0), all others held."""
        before, after = cuts[:cycle], cuts[cycle + 1 :]
        there = self.stops((*before, *(None,) * (len(cuts) - cycle))) > cycle
        here = Outcomes(scores=self.scores[there], losses=self.losses[there], costs=self.costs, asking=self.asking)
        loss, cost = here.loss_and_cost((*(None,) * (cycle + 1), *after))
        gain = loss - here.losses[:, cycle] + price * (cost - self.costs[cycle])
        scores, order = here.scores[:, cycle].sort(descending=True)
        below = torch.cat([scores[1:], scores.new_tensor([-torch.inf])])
        # tokens with equal scores stop together, those without a score never
        gained = gain[order].cumsum(0).masked_fill((scores == below) | scores.isinf(), -torch.inf)
        if not len(gained) or gained.max() <= price * self.asking * len(gained):
            return (*before, None, *after)
        last = int(gained.argmax())
        # between two scores, where rounding is least likely to decide
        cut = (scores[last] + below[last]) / 2 if below[last].isfinite() else scores[last]
        return (*before, cut.item(), *after)

    def descend(self, cuts: Cuts, price: float) -> Cuts:
        """Cuts of which none can be improved alone, from these."""
        least = torch.inf
        while (now := self.total(cuts, price)) < least - ENOUGH:
            least = now
            for cycle in reversed(range(len(cuts))):
                cuts = self.improve(cuts, cycle, price)
        return cuts

    def best(self, price: float, starts: Iterable[Cuts] = ()) -> Cuts:
        """The best cuts that descents find from the best of the fixed depths and of further `starts`."""
        ranked = sorted({*self.fixed(), *starts}, key=lambda cuts: self.total(cuts, price))
        found = [self.descend(cuts, price) for cuts in ranked[:STARTS]]
        return min(found, key=lambda cuts: self.total(cuts, price))

    def fixed(self) -> list[Cuts]:
        """Cuts that stop every token after the same cycle, or none; of cycles after which all have a score."""
        count = self.scores.shape[1]
        lowest = self.scores.amin(0)
        made = [(*(None,) * c, s, *(None,) * (count - c - 1)) for c, s in enumerate(lowest.tolist()) if s > -torch.inf]
        return [*made, (None,) * count]

    def oracle(self, price: float, known: Float[Tensor, "n cycles"] | None = None) -> tuple[float, float]:
        """Mean loss and cost where each token stops after the cycle that is best by what is `known` of its losses
        (default: these themselves), at no cost of asking: what no rule that knows less can reach."""
        stops = ((self.losses if known is None else known) + price * self.costs).argmin(1)
        return self.losses.gather(1, stops[:, None]).mean().item(), self.costs[stops].mean().item()
