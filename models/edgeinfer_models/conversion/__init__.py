"""Weights from one kind of file to another, in numpy, a few rows at a time."""
