"""Makes `docs/reference/` from the code, and finds the commands in the documentation."""
