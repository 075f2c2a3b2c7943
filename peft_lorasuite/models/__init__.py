"""Loading and running backbones."""
