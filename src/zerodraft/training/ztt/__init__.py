"""Training looped models: from scratch, from a checkpoint, or from a converted model."""
