"""`hillinfer bench decode`: whole decode steps, HillInfer beside the caches of transformers."""
