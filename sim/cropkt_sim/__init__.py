"""The simulation: the same coordinator and hospitals, all on one machine or cluster."""
