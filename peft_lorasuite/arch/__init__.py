"""Architectures: what the layers of each model family look like."""
