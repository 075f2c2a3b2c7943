"""Reports of upgrade maps and adapters: figures, HTML pages, tables."""
