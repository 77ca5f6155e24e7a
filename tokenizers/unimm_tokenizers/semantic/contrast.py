"""Pictures and their words side by side, so that codes say what is seen.

GroupViT's contrastive loss (Xu et al., arXiv 2202.11094, section 3.3) between the mean of a
picture's tokens and its words, as SeTok takes it over. Words that occur several times in a batch
are one text with several pictures: each of those is right for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BUCKETS = 4096  # of hashed letter triples
_MAX_SCALE = 100.0  # CLIP's bound of the inverse temperature


class WordsContrast(nn.Module):
    """Contrastive loss of picture embeddings and short texts.

    Texts are read as sums of hashed letter triples: enough for class names and captions of a few
    words, and nothing to download.

    Args:
        dim: channels of the picture embeddings.
        width: channels in which pictures and words meet.
    """

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.pictures = nn.Linear(dim, width)
        self.triples = nn.EmbeddingBag(_BUCKETS, width, mode="mean", padding_idx=0)
        self.words = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, embedding: Tensor, text: Tensor) -> Tensor:
        """Embeddings (B, dim), texts uint8 or int64 (B, L) of UTF-8 padded with 0 -> scalar loss.

        Pictures without a text (all 0) are left out; fewer than two different texts give 0.
        """
        captioned = text.bool().any(1)
        texts, which = text[captioned].unique(dim=0, return_inverse=True)
        if len(texts) < 2:
            return embedding.sum() * 0
        pictures = F.normalize(self.pictures(embedding[captioned].float()), dim=-1)
        scale = self.log_scale.exp().clamp(max=_MAX_SCALE)
        logits = scale * pictures @ self.embed_text(texts).T  # (pictures, texts)
        right = F.one_hot(which, len(texts)).T.to(logits.dtype)
        by_text = -(right / right.sum(1, keepdim=True) * logits.T.log_softmax(1)).sum(1).mean()
        return (F.cross_entropy(logits, which) + by_text) / 2

    def embed_text(self, text: Tensor) -> Tensor:
        """Bytes (B, L), padded with 0 -> unit vectors (B, width)."""
        padded = F.pad(text.long(), (1, 2))
        triples = padded.unfold(1, 3, 1)
        hashed = (triples * triples.new_tensor([961, 31, 1])).sum(-1) % (_BUCKETS - 1) + 1
        there = (triples != 0).any(-1)
        return F.normalize(self.words(self.triples(hashed * there)), dim=-1)
