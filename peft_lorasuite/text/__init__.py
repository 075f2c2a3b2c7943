"""Prompts, labeled examples, calibration text and vocabularies."""
