"""`hillinfer eval`: what selection costs in answers, on generated tasks, for any local model."""
