"""From a float model to few bits: search.py leads through the steps, quantizer.py is what they come to."""
