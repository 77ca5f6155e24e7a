# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""The decoder: ids in, logits over the one vocabulary out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.checkpoint import (
    LM_FOLDER,
    HubMixin,
    lm_folder,
    load_weights,
    read_config,
    reopen,
    save_weights,
)
from unimm.display import html
from unimm.model.block import BLOCKS, RMSNorm
from unimm.model.cache import KVCache
from unimm.model.config import ModelConfig
from unimm.model.initial import initialise
from unimm.model.positions import rotary_positions


class UnifiedLM(HubMixin, nn.Module):
    """Decoder-only transformer: RMSNorm, QK-norm, SwiGLU, grouped queries, three-axis rotary.

    Args:
        config: shape of the model.

    Raises:
        ValueError: the config names no `vocab_size`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("a model needs vocab_size: take Vocabulary.padded_size")
        self.config = config
        # Drawn before anything else draws: the same with weights and without (on "meta").
        self.seed = int(torch.randint(2**31, (), device="cpu"))
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            BLOCKS[config.norm_order](config, layer) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            None
            if config.tied_embeddings
            else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        self._compiled: Callable[..., Tensor] | None = None
        self.reset_parameters()

    def facts(self) -> dict[str, str]:
        """What the model is, in words."""
        config, weight = self.config, self.embedding.weight
        positions = "t, h, w" if len(config.rope_bases) == 3 else "one axis"
        window = "" if config.window is None else f", windows of {config.window}"
        return {
            "parameters": f"{self.num_parameters:,}",
            "ids": f"{config.vocab_size:,}",
            "layers": f"{config.num_layers} of width {config.d_model}, {config.norm_order}-norm",
            "heads": f"{config.num_heads} of {config.head_dim}, {config.kv_heads} for keys{window}",
            "positions": positions,
            "weights": f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}",
        }

    def __repr__(self) -> str:
        facts = [f"{name} {value}" for name, value in self.facts().items()]
        return f"UnifiedLM({'; '.join(facts[:3])};\n  {'; '.join(facts[3:])})"

    def _repr_html_(self) -> str:
        return html.card("UnifiedLM", self.facts().items())

    def reset_parameters(self) -> None:
        """Initial weights, by the seed that torch's global generator drew; none on "meta"."""
        if not self.embedding.weight.is_meta:
            initialise(self, "", self.config, self.seed)

    @property
    def head_weight(self) -> Tensor:
        """(V, d_model), the output head; the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embedding.weight.device

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states under the head.

        Args:
            ids: int64 (B, T).
            positions: int64 (3, B, T) as the grammar gives them; None: plain text, 0, 1, 2, ...;
                a model with one rotary base numbers ids as they come, and does not read them.
            segment_ids: int64 (B, T); ids of different segments never see each other.
            cache: keys and values of what came before; the new ones are stored there. The caller
                then moves the cache's lengths with `KVCache.advance`.

        Returns:
            (B, T, d_model).
        """
        assert cache is None or segment_ids is None, "a cache holds one document per row"
        axes = len(self.config.rope_bases)
        if positions is None or axes == 1:
            start = 0 if cache is None else cache.lengths[:, None]
            line = start + torch.arange(ids.shape[1], device=ids.device)
            positions = line.expand(axes, *ids.shape)
        positions = rotary_positions(self.config, positions)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, positions, segment_ids, cache)
        return self.norm(x)

    def step(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`hidden` of the next few ids (B, t) at their positions (3, B, t) behind a cache.

        One id goes through the compiled form, if there is one.
        """
        if self._compiled is not None and ids.shape[1] == 1:
            return self._compiled(ids, positions, None, cache)
        return self.hidden(ids, positions, cache=cache)

    def compile_step(self, **options: Any) -> None:
        """Let generation's steps of one id run compiled, on static caches.

        Args:
            options: of `torch.compile`; on a CUDA device `mode="reduce-overhead"` is the default,
                which records CUDA graphs. Each shape of batch and cache compiles once.
        """
        if self.device.type == "cuda":
            options = {"mode": "reduce-overhead", **options}
        self._compiled = torch.compile(self.hidden, fullgraph=True, dynamic=False, **options)

    @property
    def static(self) -> bool:
        """Whether steps want static caches."""
        return self._compiled is not None

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of ids (B, T); see `hidden`."""
        return self.logits(self.hidden(ids, positions, segment_ids))

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits (..., n) of ids `start` to `stop` - 1 (None: V) from hidden states (..., d_model).

        Only those rows of the head are read: at V = 65,536 the head is most of a small model.
        """
        return self.cap(F.linear(hidden, self.head_weight[start:stop]))

    def cap(self, logits: Tensor) -> Tensor:
        """What the head made, any shape, bounded softly where the config says so."""
        bound = self.config.logit_cap
        return logits if bound is None else bound * torch.tanh(logits / bound)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `lm/config.json` and `lm/model.safetensors` into a bundle folder.

        Above 5 GB the weights stand in shards, as on the Hub; `dtype` casts them.
        An `index.json` that stands there is void and removed: seal the bundle anew.
        """
        config = dataclasses.asdict(self.config)
        reopen(folder)
        save_weights(Path(folder) / LM_FOLDER, config, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """Read the language model of a bundle: shipped name, folder, or Hub repository id.

        Args:
            name_or_path: see `unimm.checkpoint.find_bundle`; a local folder comes first.
            revision: commit, tag or branch of a Hub repository.
            dtype: of the weights; None keeps what is stored.

        Raises:
            ValueError: nothing is found, or a file is missing, damaged or of another shape.
        """
        folder = lm_folder(name_or_path, revision)
        with torch.device("meta"):  # initial weights would only cost time and memory
            model = cls(read_config(ModelConfig, folder))
        load_weights(model, folder, dtype)
        return model.eval()
