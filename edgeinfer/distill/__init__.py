"""Training of early exits from a model's own texts: `edgeinfer.distill.training` does it."""
