"""The doors: a decoder with everything chosen for a model, and the drafter that suits it."""
