"""Evaluation on held-out text: `tnt eval`, and the scores that the trainer reports."""
