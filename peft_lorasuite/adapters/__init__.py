"""The tensors and files of PEFT adapters, kind by kind; `adapter` is the room that uses them."""
