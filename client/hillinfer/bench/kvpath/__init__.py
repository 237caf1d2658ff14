"""`hillinfer bench kvpath`: from a query to staged KV, HillInfer beside its rivals on the same drive."""
