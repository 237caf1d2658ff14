"""The commands of ``hillinferctl``, one module for what belongs together."""
