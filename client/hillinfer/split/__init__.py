"""Ranking shared between CPU and drive: a boundary in each layer, mirrored keys, and one merged result."""
