"""Linear algebra on tensors, without models or files."""
