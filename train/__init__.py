"""Two-stage training of TNT models: data, trainer, evaluation and the `tnt` command."""
