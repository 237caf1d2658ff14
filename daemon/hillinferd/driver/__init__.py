"""Storage drivers: the only code that touches a drive, used by the device worker alone."""
