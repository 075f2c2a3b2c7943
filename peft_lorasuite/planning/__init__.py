"""Estimates of memory and time before anything is loaded."""
