"""Reading and writing of PEFT adapters."""
