"""Publishing on the Hub: model cards, commits, adapters and upgrade maps."""
