"""Generation: whatever the model writes is derived by the grammar, and so decodes."""

from unimm.generation.api import extend, generate, generate_batch, infill
from unimm.generation.chat import Chat, say_together
from unimm.generation.sampling import Sampling
from unimm.generation.scoring import Classification, Score, classify, score
from unimm.generation.streaming import Piece, join, stream

__all__ = [
    "Chat",
    "Classification",
    "Piece",
    "Sampling",
    "Score",
    "classify",
    "extend",
    "generate",
    "generate_batch",
    "infill",
    "join",
    "say_together",
    "score",
    "stream",
]
