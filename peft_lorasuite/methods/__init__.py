"""The conversion methods, one file each, and their registry."""
