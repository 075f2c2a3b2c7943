"""How models run on a machine: loading, memory, processes, progress, and what is borrowed of somebody else's."""
