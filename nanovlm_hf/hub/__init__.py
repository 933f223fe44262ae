"""Everything about the Hub: code in checkpoints, publishing models and datasets, cards and authentication."""
