"""To the Hub: model cards and uploads."""
