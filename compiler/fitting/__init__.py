"""Layers fitted one after another, each behind those that were fitted already: what rounding and pruning share."""
