"""APP, the Adaptive Prefetch-based Pipeline: the daemon ranks and fetches while the model computes."""
