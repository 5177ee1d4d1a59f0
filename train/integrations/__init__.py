"""Stage 2 under other trainers: transformers' Trainer, PEFT."""
