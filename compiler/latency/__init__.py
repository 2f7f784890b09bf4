"""How long layers take on the target: kernels timed in real networks, and a table by shape that predicts others."""
