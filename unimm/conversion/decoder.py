"""The decoder, ours and Hugging Face's: Llama, Mistral, Qwen 2 and 3, Chameleon.

All of them are pre-norm RMSNorm decoders with SwiGLU and half-split rotary embedding, as ours is;
they differ in the norm of queries and keys, biases, windows and the order of norms. Chameleon's
layout is that of its `transformers` port (arXiv 2405.09818).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from unimm.conversion.folder import HuggingFaceFolder, rope_of
from unimm.model import ModelConfig, RopeScaling

Kind = Literal["llama", "mistral", "qwen2", "qwen3", "chameleon"]
KINDS: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "chameleon": "ChameleonForConditionalGeneration",
}
_LLAMA3 = {
    "factor": "factor",
    "slow": "low_freq_factor",
    "fast": "high_freq_factor",
    "length": "original_max_position_embeddings",
}
_PLAIN = {
    "attention.out.weight": "self_attn.o_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
_QK = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}


def config_from(folder: HuggingFaceFolder, vocab_size: int) -> ModelConfig:
    """Our config for a Hugging Face model, with rows for `vocab_size` ids.

    Raises:
        ValueError: a model type or a part of it that has no counterpart; names it.
    """
    config, where = folder.config, str(folder.path)
    kind = config["model_type"]
    if kind not in KINDS:
        raise ValueError(f"{where}: model type {kind!r} is unknown; known are {', '.join(KINDS)}")
    for key, plain in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("attention_bias", False),
        ("use_sliding_window", False),
    ):
        if config.get(key, plain) != plain:
            raise ValueError(f"{where}: {key} {config[key]!r} has no counterpart here")
    base, scaling = rope_of(config, where)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    window = config.get("sliding_window") if kind == "mistral" else None
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=config["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        d_head=None if width * heads == config["hidden_size"] else width,
        d_ff=config["intermediate_size"],
        rope_bases=(base,),
        rope_scaling=RopeScaling(**{our: scaling[their] for our, their in _LLAMA3.items()})
        if scaling
        else None,
        qk_norm={"qwen3": "rms", "chameleon": "layer"}.get(kind),  # pyright: ignore[reportArgumentType]
        qkv_bias=kind == "qwen2",
        norm_eps=config.get("rms_norm_eps", 1e-5 if kind == "chameleon" else 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
        norm_order="swin" if config.get("swin_norm") else "pre",
        window=window,
        full_every=6 if window is None else layers + 1,  # Mistral's every layer has its window
    )


def kind_of(config: ModelConfig) -> Kind:
    """The Hugging Face model type that a model can be written as.

    Raises:
        ValueError: there is none; says why.
    """
    if len(config.rope_bases) != 1:
        raise ValueError(
            "a model with rotary positions on three axes has no counterpart in Hugging Face's "
            "families; one with a single rotary base, as converted ones have it, does"
        )
    for name, value in (("experts", config.experts), ("logit_cap", config.logit_cap)):
        if value is not None:
            raise ValueError(f"a model with {name} has no counterpart in Hugging Face's families")
    if config.qk_norm == "layer":
        return "chameleon"
    windowed = config.window is not None and config.full_every > config.num_layers
    options = (config.qk_norm, config.qkv_bias, windowed)
    kinds: dict[tuple[str | None, bool, bool], Kind] = {
        (None, False, False): "llama",
        (None, False, True): "mistral",
        (None, True, False): "qwen2",
        ("rms", False, False): "qwen3",
    }
    if options not in kinds or config.norm_order != "pre" or (config.window and not windowed):
        raise ValueError(
            f"no Hugging Face model has qk_norm {config.qk_norm!r}, qkv_bias {config.qkv_bias}, "
            f"window {config.window} and norm_order {config.norm_order!r} together"
        )
    return kinds[options]


def config_to(config: ModelConfig, context: int) -> dict[str, Any]:
    """The `config.json` of our model, without its special ids."""
    kind = kind_of(config)
    rope: dict[str, Any] = {"rope_theta": config.rope_bases[0], "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": "llama3"}
        rope |= {their: getattr(scaling, our) for our, their in _LLAMA3.items()}
    made = {
        "architectures": [KINDS[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_bases[0],  # where transformers 4 looks for it
        "tie_word_embeddings": config.tied_embeddings,
    }
    if kind == "mistral":
        made["sliding_window"] = config.window
    if kind == "chameleon":
        made["swin_norm"] = config.norm_order == "swin"
    return made


def weights_from(folder: HuggingFaceFolder, config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors of all layers and the last norm; embedding and head are the caller's."""
    state = {"norm.weight": folder.tensor("model.norm.weight")}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for our, their in _PLAIN.items():
            state[ours + our] = folder.tensor(theirs + their)
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            names = [f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv"]
            state[f"{ours}attention.qkv.{part}"] = torch.cat([folder.tensor(n) for n in names])
        names = [f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")]
        state[ours + "feed_forward.gate_up.weight"] = torch.cat([folder.tensor(n) for n in names])
        for our, their, part in _norms(config):
            state[ours + our] = folder.tensor(f"{theirs}{their}.{part}").flatten()
    return state


def weights_to(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `weights_from`."""
    made = {"model.norm.weight": state["norm.weight"]}
    head = config.head_dim
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for our, their in _PLAIN.items():
            made[theirs + their] = state[ours + our]
        sizes = [n * head for n in (config.num_heads, config.kv_heads, config.kv_heads)]
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = state[f"{ours}attention.qkv.{part}"].split(sizes)
            for name, value in zip("qkv", parts, strict=True):
                made[f"{theirs}self_attn.{name}_proj.{part}"] = value
        gate, up = state[ours + "feed_forward.gate_up.weight"].chunk(2)
        made |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        for our, their, part in _norms(config):
            value = state[ours + our]
            flat = config.qk_norm == "rms"
            made[f"{theirs}{their}.{part}"] = value if flat else value.view(-1, head)
    return made


def _norms(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Our name, their name and their last part of each tensor of the norm of queries and keys."""
    for our, their in _QK.items() if config.qk_norm else ():
        yield our, their, "weight"
        if config.qk_norm == "layer":
            yield our + "_bias", their, "bias"


Rows = Callable[[Tensor], Tensor]


def rows_from(folder: HuggingFaceFolder, config: ModelConfig, rows: Rows) -> dict[str, Tensor]:
    """Our embedding and head, their rows moved by `rows`."""
    state = {"embedding.weight": rows(folder.tensor("model.embed_tokens.weight"))}
    if not config.tied_embeddings:
        state["head.weight"] = rows(folder.tensor("lm_head.weight"))
    elif "lm_head.weight" in folder:
        folder.taken.add("lm_head.weight")  # the same numbers again
    return state


def rows_to(state: Mapping[str, Tensor], config: ModelConfig, rows: Rows) -> dict[str, Tensor]:
    """The inverse of `rows_from`."""
    made = {"model.embed_tokens.weight": rows(state["embedding.weight"])}
    if not config.tied_embeddings:
        made["lm_head.weight"] = rows(state["head.weight"])
    return made
