"""Converting adapters: one adapter or a collection, with a map that is built, loaded or cached."""
