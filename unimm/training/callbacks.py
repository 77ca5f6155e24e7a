"""What a codec's training shows while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from unimm.training.codec import CodecTask
from unimm_tokenizers.storage import replacing


class WriteReconstructions(lightning.Callback):
    """Writes originals beside reconstructions at each validation, into `<run>/samples`.

    Args:
        count: signals of each modality.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first validation batch."""
        if batch_idx or not trainer.is_global_zero or not isinstance(pl_module, CodecTask):
            return
        folder = Path(trainer.default_root_dir, "samples", f"step={trainer.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        codec = pl_module.codec
        for modality, signals in batch.items():
            real = signals[: self.count].float()
            made = codec.decode(codec.encode(real), tuple(real.shape[2:]))
            if modality == "audio":
                write_sounds(folder, real, made, int(codec.sample_rate or 0))
            else:
                write_sheet(folder / f"{modality}.png", real, made)


def write_sounds(folder: Path, real: Tensor, made: Tensor, sample_rate: int) -> None:
    """Write sounds (B, C, T) as `<n>-original.wav` and `<n>-reconstruction.wav`."""
    for name, sounds in (("original", real), ("reconstruction", made)):
        for number, sound in enumerate(sounds.cpu()):
            with replacing(folder / f"{number}-{name}.wav") as temporary:
                soundfile.write(temporary, sound.T.numpy(), sample_rate, format="WAV")


def write_sheet(path: Path, real: Tensor, made: Tensor) -> None:
    """Write pictures (B, C, H, W), or films as strips of frames, originals above."""
    rows = [_strip(pictures) for pictures in (real, made)]
    array = ((torch.cat(rows, dim=1) + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = array.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")


def _strip(pictures: Tensor) -> Tensor:
    """(B, C, H, W) side by side, (B, C, T, H, W) as a strip for each film -> (C, H', W')."""
    if pictures.ndim == 5:
        films = [torch.cat(list(film.unbind(1)), dim=2) for film in pictures]
        return torch.cat(films, dim=1)
    return torch.cat(list(pictures), dim=2)
