"""Things that fill the next k positions: the block-diffusion drafter, prompt lookup, a small autoregressive model."""
