"""Upgrade maps: building, storing and loading them."""
