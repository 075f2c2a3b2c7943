"""What the methods share that reproduce the adapter's effect on the logits."""
