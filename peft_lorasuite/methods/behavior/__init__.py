"""Building blocks of the methods that reproduce the adapter's effect on the logits."""
