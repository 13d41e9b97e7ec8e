"""The optimizers of `training.optim` for stacked models: every model has its own learning rates and gradient norm."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from zerodraft.training.muon import Muon, orthogonalise, update_scale
from zerodraft.training.optim import JoinedOptimizer, build_optimizer
from zerodraft.training.recipe import TrainingRecipe

EPSILON = 1e-8
"""AdamW's, torch's default."""


@dataclass(kw_only=True)
class _Treatment:
    """How one parameter is updated; `rates` are the peak learning rates `(runs,)`."""

    muon: bool
    weight_decay: float
    momentum: float
    rates: list[float] = field(default_factory=list)


class StackedOptimizer:
    """AdamW, or Muon and AdamW, over parameters `(runs, ...)`.

    All state is in tensors on the parameters' device, and a step takes nothing from Python but what `begin_step` put
    there, so that it can be recorded as a CUDA graph.

    Args:
        models: One a run, alike but for their weights; only asked for how their parameters are treated.
        parameters: Their stacked parameters by name; updated in place.
        recipes: Optimizer and learning rates of each run.
    """

    def __init__(
        self, models: Sequence[nn.Module], parameters: dict[str, Tensor], recipes: Sequence[TrainingRecipe]
    ) -> None:
        treatments: dict[str, _Treatment] = {}
        for model, recipe in zip(models, recipes, strict=True):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            built = build_optimizer(model, recipe)
            for member in built.members if isinstance(built, JoinedOptimizer) else [built]:
                for group in member.param_groups:
                    for parameter in group["params"]:
                        treatment = treatments.setdefault(
                            names[id(parameter)],
                            _Treatment(
                                muon=isinstance(member, Muon),
                                weight_decay=group["weight_decay"],
                                momentum=group.get("momentum", 0.0),
                            ),
                        )
                        treatment.rates.append(group["lr"])
        self.parameters, self.names = parameters, list(parameters)
        self.max_norm, self.betas = recipes[0].max_grad_norm, recipes[0].betas
        some = next(iter(parameters.values()))
        self._scale = some.new_zeros(())
        self._adamw = _AdamW({n: p for n, p in parameters.items() if not treatments[n].muon}, treatments, self.betas)
        by_shape: dict[tuple, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            if treatments[name].muon:
                by_shape.setdefault((parameter.shape, treatments[name].weight_decay), {})[name] = parameter
        self._matrices = [_Muon(group, treatments) for group in by_shape.values()]

    def begin_step(self, scale: float) -> None:
        """Sets the learning rates of the next step as a share of their peaks."""
        self._scale.fill_(scale)

    def state(self) -> list[Tensor]:
        """All tensors that a step changes, beside the parameters."""
        return [*self._adamw.state(), *(group.momentum for group in self._matrices)]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One update by the gradients of the sum of all losses, in the order of the parameters; those without one stay
        as they are, and so does what is kept for them."""
        found = {name: gradient for name, gradient in zip(self.names, gradients, strict=True) if gradient is not None}
        found = self._clipped(found)
        self._adamw.step(found, self._scale)
        for group in self._matrices:
            group.step(found, self._scale)

    def _clipped(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.max_norm:
            return gradients
        norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()]).sum(0).sqrt()
        factors = (self.max_norm / (norms + 1e-6)).clamp(max=1.0)
        return {name: gradient * _like(factors, gradient) for name, gradient in gradients.items()}


class _AdamW:
    """AdamW (Loshchilov and Hutter 2019) over all its parameters in one buffer `(runs, n)`: few kernels a step."""

    def __init__(
        self, parameters: dict[str, Tensor], treatments: dict[str, _Treatment], betas: Sequence[float]
    ) -> None:
        self.parameters, self.betas = parameters, betas
        self.decays = {name: treatments[name].weight_decay for name in parameters}
        self.sizes = [parameter[0].numel() for parameter in parameters.values()]
        rates = [
            parameter.new_tensor(treatments[name].rates)[:, None].expand(-1, size)
            for (name, parameter), size in zip(parameters.items(), self.sizes, strict=True)
        ]
        self.rates = torch.cat(rates, 1) if rates else torch.zeros(0, 0)
        self.mean, self.square = torch.zeros_like(self.rates), torch.zeros_like(self.rates)
        # updates of each number so far
        self.time = torch.zeros_like(self.rates[:1])

    def state(self) -> list[Tensor]:
        return [self.mean, self.square, self.time]

    def step(self, gradients: dict[str, Tensor], scale: Tensor) -> None:
        if not self.parameters:
            return
        flat = torch.cat([gradients.get(n, torch.zeros_like(p)).flatten(1) for n, p in self.parameters.items()], 1)
        used = torch.cat([
            self.time.new_full((1, size), float(name in gradients))
            for name, size in zip(self.parameters, self.sizes, strict=True)
        ], 1)  # fmt: skip
        self.mean.lerp_(flat, (1 - self.betas[0]) * used)
        self.square.lerp_(flat.square(), (1 - self.betas[1]) * used)
        self.time.add_(used)
        mean = self.mean / (1 - self.betas[0] ** self.time)
        rates = scale * self.rates
        updates = rates * mean / ((self.square / (1 - self.betas[1] ** self.time)).sqrt() + EPSILON)
        pieces = zip(self.parameters.items(), updates.split(self.sizes, 1), rates.split(self.sizes, 1), strict=True)
        for (name, parameter), update, rate in pieces:
            if name in gradients:
                parameter.mul_(1 - self.decays[name] * rate.view_as(parameter)).sub_(update.view_as(parameter))


class _Muon:
    """`training.muon.Muon` over matrices of one shape, all in one batch `(matrices, runs, rows, columns)`."""

    def __init__(self, parameters: dict[str, Tensor], treatments: dict[str, _Treatment]) -> None:
        self.parameters = parameters
        first, some = treatments[next(iter(parameters))], next(iter(parameters.values()))
        self.decay, self.beta = first.weight_decay, first.momentum
        self.rates = some.new_tensor([treatments[name].rates for name in parameters])[..., None, None]
        self.momentum = torch.zeros_like(torch.stack(list(parameters.values())))

    def step(self, gradients: dict[str, Tensor], scale: Tensor) -> None:
        stacked = torch.stack([gradients.get(n, torch.zeros_like(p)) for n, p in self.parameters.items()])
        # filled, not copied from the host, which a graph cannot hold
        used = torch.stack([stacked.new_full((), float(name in gradients)) for name in self.parameters])
        self.momentum.lerp_(stacked, (1 - self.beta) * _like(used, stacked))
        ahead = stacked.lerp(self.momentum, self.beta).flatten(0, 1)
        directions = vmap(orthogonalise)(ahead).view_as(stacked)
        rates = scale * self.rates
        updates = rates * update_scale(stacked.shape[-2:]) * directions
        for (name, parameter), rate, update in zip(self.parameters.items(), rates, updates, strict=True):
            if name in gradients:
                parameter.mul_(1 - self.decay * rate).sub_(update)


def _like(values: Float[Tensor, " n"], tensor: Tensor) -> Tensor:
    """One value for each entry of the first dimension of `tensor`, in a shape that multiplies it."""
    return values.view(-1, *(1,) * (tensor.ndim - 1))
