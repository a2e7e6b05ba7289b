"""The hospital: trains on its own slides and lets only checked messages out."""
