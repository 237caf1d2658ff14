"""Checks of the machine, each with a verdict and a remedy; none changes anything but a scratch file."""
