"""Graph passes: one file a pass, plus base.py (the contract) and registry.py (the list)."""
