"""Packed documents as key ranges: which tokens of a row belong to the document of each token.

Two notations are read. `segment_ids` (B, T): a document is a maximal run of equal ids.
`cu_seqlens` (n + 1,): starts of the documents among the B * T tokens of the batch, as in
FlashAttention's variable-length interface; repeat the last value to pad it to a fixed length, which
keeps `torch.compile` from compiling again for every batch. A row's first token starts a document in
both. Both become `starts` and `ends`, the range [starts[b, i], ends[b, i]) of the document of token
i in row b. Ranges grow with i, so the attention kernels turn them into loop bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_ranges(
    segment_ids: Tensor | None, cu_seqlens: Tensor | None, batch: int, length: int
) -> tuple[Tensor, Tensor] | None:
    """`starts` and `ends`, int32 (B, T), or None where neither notation is given.

    Runs without a host sync. ValueError for both at once or for a wrong shape.
    """
    if segment_ids is None and cu_seqlens is None:
        return None
    if segment_ids is not None and cu_seqlens is not None:
        raise ValueError("attention: give segment_ids or cu_seqlens, not both")
    if segment_ids is not None:
        if segment_ids.shape != (batch, length):
            raise ValueError(
                f"attention: segment_ids {tuple(segment_ids.shape)} must be ({batch}, {length})"
            )
        first = torch.ones_like(segment_ids, dtype=torch.bool)
        first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    else:
        assert cu_seqlens is not None
        if cu_seqlens.ndim != 1:
            raise ValueError(f"attention: cu_seqlens {tuple(cu_seqlens.shape)} must be (n + 1,)")
        total = batch * length
        flat = torch.zeros(total + 1, dtype=torch.bool, device=cu_seqlens.device)
        first = flat.index_fill(0, cu_seqlens.long(), True)[:total].view(batch, length)
        first = first | (torch.arange(length, device=first.device) == 0)
    index = torch.arange(length, dtype=torch.int32, device=first.device).expand(batch, length)
    starts = torch.where(first, index, 0).cummax(1).values
    # The next document's start, seen from behind: the nearest first token to the right.
    nexts = torch.where(first, index, length)[:, 1:].flip(1)
    nexts = torch.cat([nexts.new_full((batch, 1), length), nexts], 1).cummin(1).values
    return starts.to(torch.int32), nexts.flip(1).to(torch.int32)
