"""Discrete-time survival: bins, likelihoods, concordance."""
