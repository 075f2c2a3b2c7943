"""Reading and writing PEFT adapters."""
