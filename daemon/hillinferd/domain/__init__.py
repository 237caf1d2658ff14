"""What the daemon keeps account of, without any input or output."""
