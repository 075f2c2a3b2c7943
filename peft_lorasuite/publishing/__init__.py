"""Cards, journals and commits on the Hub."""
