"""Which nodes run in which precision: errors and latencies are measured, an integer program chooses."""
