"""Publishing on the Hub: model cards, and pushes of adapters and upgrade maps."""
