"""edgeinfer: a local LLM runtime for one person's machine. Importing it loads no framework."""

from __future__ import annotations

import logging

from edgeinfer.errors import EdgeInferError
from edgeinfer.sampling import SamplingParams

__version__ = "0.1.0"

# A library says nothing unless asked; without this, Python prints warnings of ours to the screen.
logging.getLogger("edgeinfer").addHandler(logging.NullHandler())

__all__ = ["EdgeInferError", "SamplingParams", "__version__"]
