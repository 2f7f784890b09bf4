"""Where an artifact runs and is timed."""
