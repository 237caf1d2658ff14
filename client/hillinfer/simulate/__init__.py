"""An event-level model of a decode step on other hardware, with HillInfer's own policies deciding in it."""
