"""Training and scoring on labeled examples."""
