"""Figures and pages of maps and adapters."""
