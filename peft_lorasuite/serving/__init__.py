"""What programs that serve adapters load, refuse and drop, and adapters in the form that they load whole."""
