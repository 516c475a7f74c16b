"""edgeinfer: a local LLM runtime for one person's machine. Importing it loads no framework."""

from __future__ import annotations

from edgeinfer.errors import EdgeInferError
from edgeinfer.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = ["EdgeInferError", "SamplingParams", "__version__"]
