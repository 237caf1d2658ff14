"""What outlives the daemon about durable contexts: a database beside the pool, and its check."""
