"""Training and scoring on labelled examples, as token ids."""
