"""Scores on tasks: how likely texts are, questions from local files, and lm-evaluation-harness around both."""
