"""How a target runs, and how it runs fast: its own forward pass over drafts, packed weights on a CPU, CUDA graphs."""
