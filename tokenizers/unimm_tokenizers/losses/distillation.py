"""Semantic distillation: the first code level learns what a teacher hears.

SpeechTokenizer (Zhang et al., arXiv 2308.16692, section 3.3): the first level follows features of a
speech model, so that it carries what was said and the other levels how.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.codec import Codec, CodecOutput


class SemanticDistillation(nn.Module):
    """-log sigmoid of the cosine, over time, of each projected channel with the teacher's.

    Args:
        teacher: sound (B, C, T) at the codec's rate -> features (B, D, frames) at any frame rate; a
            module is frozen.
        teacher_channels: D.
        latent_channels: channels of the codec's latents.
        weight: of the term (SpeechTokenizer: 120 beside a mel term of 45).
    """

    def __init__(
        self,
        teacher: nn.Module | Callable[[Tensor], Tensor],
        teacher_channels: int,
        latent_channels: int,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
        # Not a part of what is trained: neither its modes nor its weights belong to a checkpoint.
        self._teacher = (teacher,)
        self.projection = nn.Conv1d(latent_channels, teacher_channels, 1)
        self.weight = weight

    @property
    def teacher(self) -> nn.Module | Callable[[Tensor], Tensor]:
        """What gives the features."""
        return self._teacher[0]

    def forward(self, codec: Codec, sound: Tensor, output: CodecOutput) -> Tensor:
        """Weighted scalar loss of one pass of `codec` over sound (B, C, T).

        Raises:
            ValueError: the codec keeps its latents to itself, or the teacher's features have
                another shape than was said.
        """
        if output.latents is None:
            raise ValueError(f"{codec.name}: a codec without latents in its output has no teacher")
        latents = output.latents.float()
        first = output.codes.clone()
        first[:, 1:] = -1
        teacher = self.teacher
        if isinstance(teacher, nn.Module):
            teacher.to(sound.device)
        with torch.no_grad():
            heard = teacher(sound).float()
            # Codes are -1 while the quantizer warms up; the latents then speak for themselves.
            coded = codec.quantizer.lookup(first) if int(first.max()) >= 0 else latents
        if heard.ndim != 3 or heard.shape[1] != self.projection.out_channels:
            raise ValueError(
                f"the teacher gave {tuple(heard.shape)}, expected (batch, "
                f"{self.projection.out_channels} channels, frames)"
            )
        heard = F.interpolate(heard, latents.shape[-1], mode="linear")
        said = self.projection(latents + (coded - latents).detach())
        alike = F.cosine_similarity(said.float(), heard, dim=2)
        return -self.weight * F.logsigmoid(alike).mean()
