"""CEC: which kernel suits a model and a card, and whether a bitstream is that kernel."""
