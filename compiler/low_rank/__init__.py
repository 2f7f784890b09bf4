"""Layers as chains of smaller ones, without training: which, at which rank, and fitted to the calibration images."""
