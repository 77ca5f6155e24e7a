"""Generation: whatever the model writes is derived by the grammar, and so decodes."""

from unimm.generation.api import generate, generate_batch, stream
from unimm.generation.sampling import Sampling
from unimm.generation.scoring import Score, score

__all__ = ["Sampling", "Score", "generate", "generate_batch", "score", "stream"]
