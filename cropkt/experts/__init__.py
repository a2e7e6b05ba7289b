"""Cancer-specific survival experts: the model, its training, and many of them at once."""
