"""What the daemon does, whatever transport asked for it."""
