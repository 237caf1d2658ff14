"""Finds NVMe namespaces and SmartSSDs, and notices when they come and go."""
