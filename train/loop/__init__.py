"""The training loop: stages, optimizer, checkpoints, several processes."""
