"""What an adapter does to its backbone's answers, and how that is written into another one."""
