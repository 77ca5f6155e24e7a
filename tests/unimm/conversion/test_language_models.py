"""Llama-family models, both ways: the same numbers as `transformers` computes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer

from unimm import UnifiedLM, UnifiedTokenizer, build_codec, generate
from unimm.conversion import convert, from_hugging_face, to_hugging_face
from unimm.conversion.text import foreign_ids

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 256}),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("Llama", {"head_dim": 16}),
    ("Mistral", {"sliding_window": 7}),
    ("Mistral", {"sliding_window": None}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 32}),
]
DIFFERENCE = 1e-5


def case_name(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(value) or "plain"


def ids_of(converted_text: torch.Tensor, tokenizer: UnifiedTokenizer) -> torch.Tensor:
    return converted_text + tokenizer.vocabulary["text"].start


@pytest.mark.parametrize(("kind", "config"), KINDS, ids=case_name)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    kind: str, config: dict[str, Any], save_language_model: Any, tmp_path: Path
) -> None:
    model = save_language_model(kind, **config)
    tokenizer, lm = from_hugging_face(tmp_path / "source", [build_codec("vision-tiny-f8")])
    # <s> and </s> are markers, and no text: the pieces behind them have moved up by two.
    text = torch.arange(tokenizer.text.size)
    theirs = torch.randint(2, tokenizer.text.size + 2, (2, 40))
    expected = model(torch.cat([torch.zeros(2, 1, dtype=torch.int64), theirs], 1)).logits
    ours = torch.cat([torch.full((2, 1), tokenizer.grammar.bos), ids_of(theirs - 2, tokenizer)], 1)
    logits = lm(ours)
    assert logits.shape[-1] == tokenizer.vocabulary.padded_size
    difference = (logits[..., ids_of(text, tokenizer)] - expected[..., text + 2]).abs().max()
    assert difference <= DIFFERENCE
    ends = (logits[..., tokenizer.grammar.eos] - expected[..., 1]).abs().max()
    assert ends <= DIFFERENCE
    assert expected.std() > 0.1


@pytest.mark.parametrize(("kind", "config"), KINDS, ids=case_name)
@torch.no_grad()
def test_and_back_again(
    kind: str, config: dict[str, Any], save_language_model: Any, tmp_path: Path
) -> None:
    """Into a bundle with codecs, out of it into `transformers`, and into a bundle once more."""
    save_language_model(kind, **config)
    tokenizer, lm = from_hugging_face(tmp_path / "source", [build_codec("vision-tiny-f8")])
    to_hugging_face(tokenizer, lm, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    foreign = foreign_ids(tokenizer.vocabulary)
    ids = torch.randint(0, len(tokenizer.vocabulary), (2, 40))
    difference = (back(foreign[ids]).logits[..., foreign] - lm(ids)).abs().max()
    assert difference <= DIFFERENCE
    again = from_hugging_face(tmp_path / "out")
    assert again.tokenizer.vocabulary == tokenizer.vocabulary
    assert again.lm.config == lm.config
    for name, tensor in lm.state_dict().items():
        assert torch.equal(again.lm.state_dict()[name], tensor), name


def test_the_exported_tokenizer_is_the_same(save_language_model: Any, tmp_path: Path) -> None:
    save_language_model()
    tokenizer, lm = from_hugging_face(tmp_path / "source", [build_codec("vision-tiny-f8")])
    to_hugging_face(tokenizer, lm, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the quick fox, five times"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.text.encode(text).tolist()
    assert loaded.bos_token_id == foreign_ids(tokenizer.vocabulary)[tokenizer.grammar.bos]
    image = tokenizer.vocabulary["image.0"]
    assert loaded.convert_tokens_to_ids("<|unimm image.0 3|>") == image.start + 3


def test_text_is_cut_as_by_the_source(save_language_model: Any, tmp_path: Path) -> None:
    """Piece by piece the source's, two ids lower; control pieces are never made of text."""
    save_language_model()
    tokenizer = from_hugging_face(tmp_path / "source").tokenizer
    source = Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json"))
    for text in ("the lazy dog", " two  times\n", "\u4f60\u597d \U0001f600", ""):
        expected = source.encode(text, add_special_tokens=False).ids
        assert (tokenizer.text.encode(text) + 2).tolist() == expected
        assert tokenizer.text.decode(tokenizer.text.encode(text)) == text
    said = "a </s> b <s>"
    assert tokenizer.decode(tokenizer.encode([said])) == [said]
    assert tokenizer.grammar.eos not in tokenizer.encode([said])[1:-1].tolist()


def test_new_rows_are_the_mean_of_the_old(save_language_model: Any, tmp_path: Path) -> None:
    model = save_language_model()
    tokenizer, lm = from_hugging_face(tmp_path / "source", [build_codec("vision-tiny-f8")])
    rows = model.model.embed_tokens.weight[2 : tokenizer.text.size + 2].mean(0)
    image = tokenizer.vocabulary["image.0"]
    assert torch.allclose(lm.embedding.weight[image.start : image.end], rows, atol=1e-6)


def test_a_converted_model_lives(save_language_model: Any, tmp_path: Path) -> None:
    """Saved as a bundle, loaded, it writes text and pictures; half precision stays half."""
    model = save_language_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "bundle", [build_codec("vision-tiny-f8")])
    tokenizer = UnifiedTokenizer.from_pretrained(tmp_path / "bundle")
    stored = UnifiedLM.from_pretrained(tmp_path / "bundle", dtype=None)
    assert stored.head_weight.dtype == torch.bfloat16
    lm = UnifiedLM.from_pretrained(tmp_path / "bundle")
    assert lm.head_weight.dtype == torch.float32
    (picture,) = generate(lm, tokenizer, ["the fox"], modality="image", size=(16, 16), seed=0)[0]
    assert getattr(picture, "size", None) == (16, 16)
    (words,) = generate(lm, tokenizer, ["the fox"], modality="text", max_new_tokens=6, seed=0)
    assert all(isinstance(word, str) for word in words)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "library_name: unimm" in card
    assert "lm/model.safetensors" in card


def test_old_configs_are_read_too(save_language_model: Any, tmp_path: Path) -> None:
    """`transformers` 4 wrote rope_theta and rope_scaling."""
    save_language_model(rope_parameters=LLAMA3)
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    scaling = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
    new = from_hugging_face(_with_config(path, {**config, "rope_parameters": LLAMA3})).lm.config
    old = {**config, "rope_theta": 10000.0, "rope_scaling": scaling}
    assert from_hugging_face(_with_config(path, old)).lm.config == new


def _with_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path.parent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is unknown; known are llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' has no counterpart"),
        ({"attention_bias": True}, "attention_bias True has no counterpart"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is unknown"),
        ({"partial_rotary_factor": 0.5}, "turned in part"),
        ({"vocab_size": 100}, "do not belong together"),
        ({"num_hidden_layers": 2}, "hold 'model.layers.2.* no counterpart"),
        ({"num_hidden_layers": 4}, r"hold no 'model.layers.3"),
        ({"intermediate_size": 64}, "weights do not fit the config, first at"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    change: dict[str, Any], message: str, save_language_model: Any, tmp_path: Path
) -> None:
    save_language_model()
    path = tmp_path / "source" / "config.json"
    _with_config(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(ValueError, match=message) as caught:
        from_hugging_face(tmp_path / "source")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json: the file is missing"),
        ("model.safetensors", "can run code and is not read"),
        ("tokenizer.json", "holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_what_is_missing_is_named(
    name: str, message: str, save_language_model: Any, tmp_path: Path
) -> None:
    save_language_model()
    (tmp_path / "source" / name).unlink()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=message):
        from_hugging_face(tmp_path / "source")


def test_native_models_are_not_written_for_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rotary positions on three axes has no counterpart"):
        convert("digits", tmp_path / "out")


def test_the_source_is_never_overwritten(save_language_model: Any, tmp_path: Path) -> None:
    save_language_model()
    with pytest.raises(ValueError, match="is the source itself"):
        convert(tmp_path / "source", tmp_path / "source")


def test_shards_are_read(save_language_model: Any, tmp_path: Path) -> None:
    model = save_language_model()
    whole = from_hugging_face(tmp_path / "source").lm
    (tmp_path / "source" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 2
    sharded = from_hugging_face(tmp_path / "source").lm
    assert torch.equal(whole.embedding.weight, sharded.embedding.weight)
    next((tmp_path / "source").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-.*: the file is missing"):
        from_hugging_face(tmp_path / "source")


@torch.no_grad()
def test_a_sentencepiece_tokenizer_serves_too(save_language_model: Any, tmp_path: Path) -> None:
    """Llama 2's: <unk>, <s>, </s> in front, a space before all; it travels in our own folder."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "over the lazy dog"] * 9),
        model_writer=out,
        vocab_size=290,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=3,
    )
    source = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    size = source.get_piece_size()
    model = save_language_model(vocab_size=size, bos_token_id=1, eos_token_id=2)
    (tmp_path / "source" / "tokenizer.json").unlink()
    (tmp_path / "source" / "tokenizer.model").write_bytes(out.getvalue())
    tokenizer, lm = from_hugging_face(tmp_path / "source")
    theirs = torch.tensor([[1, *source.encode("the lazy fox")]])
    ours = tokenizer.encode(["the lazy fox"], complete=False)[None]
    text = torch.arange(tokenizer.text.size)
    difference = lm(ours)[..., ids_of(text, tokenizer)] - model(theirs).logits[..., text + 3]
    assert difference.abs().max() <= DIFFERENCE
    assert tokenizer.decode(tokenizer.encode(["the lazy fox"])) == ["the lazy fox"]
    to_hugging_face(tokenizer, lm, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    again = from_hugging_face(tmp_path / "out")
    assert again.tokenizer.vocabulary == tokenizer.vocabulary
    assert torch.equal(again.lm.embedding.weight, lm.embedding.weight)
