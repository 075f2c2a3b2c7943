"""Linear algebra: tensors in, tensors out."""
