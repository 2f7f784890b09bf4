"""Where the error of a quantized model comes from, and what may be the cause."""
