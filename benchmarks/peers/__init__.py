"""The tools that benchmarks/peers.py compares edgec with: run_*.py in environments of their own, and who runs them."""
