"""Getting a target: the plain language model that a conversion starts from or that a drafter drafts for."""

from zerodraft.targets.resolve import resolve

__all__ = ["resolve"]
