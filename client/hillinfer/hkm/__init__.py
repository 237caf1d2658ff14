"""HKM, the Hierarchical KV Cache Manager: slots, hot pool and cold pool behind a transformers cache."""
