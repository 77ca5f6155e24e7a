"""Chameleon's vocabulary and picture tokenizer, both ways (arXiv 2405.09818).

In its vocabulary a picture code is a piece whose name spells its number: `IMGIMG`, digits as
letters A to J, `Z`. A picture is `<racm3:break>`, 1,024 codes of a 32 x 32 grid, `<eoss>`; its
sizes are not written. `<reserved08706>` stands between the turns of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from unimm.checkpoint import adopt
from unimm.conversion.folder import HuggingFaceFolder
from unimm_tokenizers.vision import VQGANCodec, VQGANConfig

BEGIN, END, TURN = "<racm3:break>", "<eoss>", "<reserved08706>"
SPECIAL_NAMES = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<pad>"}
_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_LETTERS = "ABCDEFGHIJ"
_PREFIX = "model.vqmodel."
_DECODER = ("decoder.", "post_quant_conv.")


class Pieces(NamedTuple):
    """Ids in Chameleon's vocabulary: of picture codes (K,), and of pieces that become markers."""

    codes: Tensor
    markers: dict[str, int]


def code_name(code: int) -> str:
    """The piece of a picture code."""
    return f"IMGIMG{''.join(_LETTERS[int(digit)] for digit in str(code))}Z"


def pieces_of(folder: HuggingFaceFolder) -> Pieces:
    """Where picture codes and markers stand in the vocabulary.

    Raises:
        ValueError: the config has no map, or it does not name every code.
    """
    names = folder.config.get("vocabulary_map") or {}
    codes = {}
    for name, number in names.items():
        found = _CODE.fullmatch(name)
        if found:
            codes[int("".join(str(_LETTERS.index(letter)) for letter in found[1]))] = number
    if not codes or sorted(codes) != list(range(len(codes))):
        raise ValueError(f"{folder.path}: vocabulary_map must name all codes IMGIMG...Z from 0 on")
    for name in (BEGIN, END):
        if name not in names:
            raise ValueError(f"{folder.path}: vocabulary_map names no {name!r}")
    # By name: the public configs have Llama's default ids, which are others here.
    markers = {marker: names[name] for marker, name in SPECIAL_NAMES.items() if name in names}
    markers |= {"<image>": names[BEGIN], "</image>": names[END]}
    if TURN in names:
        markers |= {"<user>": names[TURN], "<assistant>": names[TURN]}
    return Pieces(torch.tensor([codes[code] for code in range(len(codes))]), markers)


def grid_of(folder: HuggingFaceFolder) -> list[int]:
    """Codes (h, w) of a picture: it has the resolution that the tokenizer was trained at."""
    vq = folder.config["vq_config"]
    side = vq.get("resolution", 512) // 2 ** (len(_multipliers(vq)) - 1)
    return [side, side]


def codec_from(folder: HuggingFaceFolder, weights: str | Path | None) -> VQGANCodec:
    """The picture tokenizer, decoder included.

    Args:
        folder: the model; its decoder is used where it has one (`transformers` leaves it out).
        weights: a file of the whole VQ-GAN: safetensors, or Meta's `vqgan.ckpt`.

    Raises:
        ValueError: there is no decoder anywhere, or the weights do not fit.
    """
    config = _config_from(folder.config["vq_config"], str(folder.path))
    state = folder.tensors(_PREFIX)
    if weights is not None:
        # Only tensors are read of a .ckpt, which is a pickle: code in it would be refused.
        path = Path(weights)
        stored: dict[str, Any] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        stored = stored.get("state_dict", stored)
        state |= {name: tensor for name, tensor in stored.items() if not name.startswith("loss.")}
    if not any(name.startswith("decoder.") for name in state):
        raise ValueError(
            f"{folder.path}: the weights hold no decoder of pictures (transformers leaves it out): "
            "name a file that has one, such as Meta's vqgan.ckpt, with --vqgan FILE"
        )
    named = {re.sub(r"^quantize\.", "quantizer.", name): t.float() for name, t in state.items()}
    with torch.device("meta"):
        codec = VQGANCodec(config)
    adopt(codec, named, str(weights or folder.path))
    return codec.eval()


def codec_to(codec: VQGANCodec, grid: list[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`vq_config` and the tensors that `transformers` has room for: all but the decoder's.

    Raises:
        ValueError: the grid is no square, which Chameleon's pictures are.
    """
    own = codec.config
    if grid[0] != grid[1]:
        raise ValueError(f"Chameleon's pictures are square, these are {grid[0]} x {grid[1]} codes")
    resolution = grid[0] * codec.downsample[0]
    config = {
        "model_type": "chameleon_vqgan",
        "embed_dim": own.codebook_dim,
        "num_embeddings": own.codebook_size,
        "double_latent": False,
        "latent_channels": own.latent_channels,
        "resolution": resolution,
        "in_channels": own.num_channels,
        "base_channels": own.channels,
        "channel_multiplier": list(own.multipliers),
        "num_res_blocks": own.num_blocks,
        "attn_resolutions": [resolution >> level for level in own.attention] or None,
        "attn_type": "vanilla" if own.middle_attention else None,
    }
    state = {
        _PREFIX + re.sub(r"^quantizer\.", "quantize.", name): tensor
        for name, tensor in codec.state_dict().items()
        if not name.startswith("decoder.")
    }
    return config, state


def _multipliers(vq: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(vq.get("channel_multiplier", (1, 1, 2, 2, 4)))


def _config_from(vq: Mapping[str, Any], where: str) -> VQGANConfig:
    if vq.get("double_latent"):
        raise ValueError(f"{where}: a VQ-GAN with double_latent has no counterpart here")
    multipliers = _multipliers(vq)
    vanilla = vq.get("attn_type", "vanilla") == "vanilla"
    wanted = (vq.get("attn_resolutions") or []) if vanilla else []
    resolution = vq.get("resolution", 512)
    return VQGANConfig(
        num_channels=vq.get("in_channels", 3),
        channels=vq.get("base_channels", 128),
        multipliers=multipliers,
        num_blocks=vq.get("num_res_blocks", 2),
        attention=tuple(i for i in range(len(multipliers)) if resolution >> i in wanted),
        middle_attention=vanilla,
        latent_channels=vq.get("latent_channels", 256),
        codebook_dim=vq.get("embed_dim", 256),
        codebook_size=vq.get("num_embeddings", 8192),
    )
