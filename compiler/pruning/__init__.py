"""Structured channel pruning without training: what to cut, and what is repaired from calibration images."""
