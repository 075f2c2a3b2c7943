"""Cards and commits on the Hub."""
