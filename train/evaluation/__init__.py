"""What a causal language model knows of held-out text: `tnt eval`, and the scores that the trainer reports."""
