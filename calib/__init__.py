"""Calibration: a folder of images becomes statistics, statistics become ranges."""
