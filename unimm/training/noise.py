"""Input noise: some of the codes that a decoder reads are replaced, those that it predicts never.

A codec's code is mostly foretold by the codes right before it, so a decoder learns little from the
item it is asked about: the digit in a picture matters for the first few codes of a spoken answer
alone. Wrong codes in its own history make it look further back (word dropout: Bowman et al., arXiv
1511.06349, section 3.1), and make it robust to its own slips when it generates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimm.vocabulary import Vocabulary


class CodeNoise(nn.Module):
    """Replace codes by others of the same codec level; text, markers and sizes stay.

    Args:
        vocabulary: the blocks.
        share: mean share of codes that are replaced; every row draws its own between 0 and twice
            that, so that clean histories stay common.

    Raises:
        ValueError: share is not in [0, 0.5].
    """

    first: Tensor
    size: Tensor

    def __init__(self, vocabulary: Vocabulary, share: float) -> None:
        super().__init__()
        if not 0 <= share <= 0.5:
            raise ValueError(f"code noise: the share must be in [0, 0.5], got {share}")
        self.share = share
        first = torch.zeros(vocabulary.padded_size, dtype=torch.int64)
        size = torch.zeros_like(first)
        for modality in vocabulary.modalities:
            if modality == "text":
                continue
            for block in vocabulary.levels(modality):
                first[block.start : block.end] = block.start
                size[block.start : block.end] = block.size
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("size", size, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T) with noise while training, the same ids otherwise."""
        if not self.training or self.share == 0:
            return ids
        size = self.size[ids]
        rate = 2 * self.share * torch.rand(len(ids), 1, device=ids.device)
        chosen = (torch.rand(ids.shape, device=ids.device) < rate) & (size > 0)
        other = self.first[ids] + (torch.rand(ids.shape, device=ids.device) * size).long()
        return torch.where(chosen, other, ids)
