"""The kinds of drafters that can be trained: a new one is a recipe that names its trainer, and its place in `RECIPES`.
Nothing here imports torch, so that help and bad settings need not wait for it."""

from zerodraft.training.drafters.autoregressive_recipe import AutoregressiveDrafterRecipe
from zerodraft.training.drafters.dflash_recipe import DFlashRecipe
from zerodraft.training.drafters.masked_recipe import MaskedDrafterRecipe
from zerodraft.training.drafters.recipe import CompletionsRecipe, DrafterRecipe

RECIPES: dict[str, type[CompletionsRecipe]] = {
    recipe.kind: recipe for recipe in (DrafterRecipe, MaskedDrafterRecipe, AutoregressiveDrafterRecipe, DFlashRecipe)
}
"""By the name of the kind; the first is the default of `zerodraft train-drafter`."""
