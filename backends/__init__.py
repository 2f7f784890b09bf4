"""Backends: a graph becomes an artifact, an artifact becomes a runner; targets: where it runs."""
