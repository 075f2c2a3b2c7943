"""What the work costs: operations, bytes and seconds."""
