"""The device worker: a process of its own that owns a driver and everything kept in DRAM about its rows."""
