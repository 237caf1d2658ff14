"""`hillinfer bench decode`: reading, asking and decoding with HillInfer beside transformers' own caches."""
