"""Training drafters on a target's own completions, one module for each kind."""
