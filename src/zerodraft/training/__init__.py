"""Training: recipes, data, losses over cycles, and a thin layer over the transformers Trainer."""
