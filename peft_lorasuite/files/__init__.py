"""Names, folders and files: what a user or a stranger gave, and output that appears whole or not at all."""
