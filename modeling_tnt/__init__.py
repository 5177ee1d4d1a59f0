"""TNT for Transformers."""
