"""An event-level model of a decode step on hardware that is not here; HillInfer's own policies decide in it."""
