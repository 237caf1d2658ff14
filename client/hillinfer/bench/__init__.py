"""Measurements that users can repeat: `hillinfer bench`."""
