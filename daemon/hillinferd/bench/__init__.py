"""Measurements that a user can repeat; nothing of the daemon imports them."""
