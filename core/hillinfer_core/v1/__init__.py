"""Generated from proto/hillinfer/v1 by ``make proto``; do not edit."""
