"""From full-precision weights to what a machine runs: forms and types of model files."""
