"""One `Report` -> terminal, JSON, HTML. Nothing is imported here: each view loads only what it needs."""
