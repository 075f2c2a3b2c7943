"""Checks of an upgraded adapter before it replaces the old one: measured on what was written."""
