"""Cohorts: which patients, their outcomes, and the patches of their slides."""
