"""Pictures read by a small decoder: semantic codes against raster codes, in one command.

    python benchmarks/semantic_lm.py runs/semantic/codec runs/semantic/raster-codec \
        runs/semantic/raster-long-codec --data runs/semantic/raw

For every codec a decoder of one shape learns documents `picture, class name` of CIFAR-10: the same
pictures in the same order, the same steps, one seed. A document's picture and its name weigh the
same in the loss, however many ids they have. Then it is asked which of the ten names is the
likeliest behind pictures that no training saw. The first codec is compared with each of the others.
Times are processor times of one thread.
"""

import argparse
import dataclasses
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from semantic import BATCH, Labelled, interval, load, share, table
from torch import Tensor

from unimm import load_codec
from unimm.data.batch import Batch, Layouts, LossWeights, PlacedDocument, collate, structure_of
from unimm.evaluation.statistics import paired_difference
from unimm.generation import classify
from unimm.model import ModelConfig, UnifiedLM
from unimm.sequence import Segment
from unimm.signals import Item
from unimm.text import TextModel
from unimm.tokenizer import UnifiedTokenizer, signal_item
from unimm.training.losses import head_loss
from unimm.training.optim import (
    OptimizerConfig,
    build_optimizers,
    clip_gradients,
    set_learning_rate,
)
from unimm.vocabulary import MODALITIES
from unimm_tokenizers import Codec
from unimm_tokenizers.storage import write_json, write_text

SHAPE = ModelConfig(d_model=128, num_layers=4, num_heads=4)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)
PIECES = 300  # of the text model: bytes, and parts of ten names
TEXT = MODALITIES.index("text")


class Corpus(NamedTuple):
    """Documents `picture, name`, and how many ids the picture of each takes, markers included."""

    documents: list[PlacedDocument]
    picture_ids: list[int]


def items(codec: Codec, pictures: Tensor) -> list[Item]:
    """Pictures (n, 3, H, W) as a document holds them for this codec."""
    return [signal_item(codec.modality, picture, codec) for picture in pictures]


def written(tok: UnifiedTokenizer, codec: Codec, data: Labelled) -> Corpus:
    """Every picture and its name as ids."""
    layouts, corpus = Layouts(tok.grammar), Corpus([], [])
    for pictures, labels in zip(data.pictures.split(BATCH), data.labels.split(BATCH), strict=True):
        for picture, label in zip(tok.encode_items(items(codec, pictures)), labels, strict=True):
            name = Segment("text", tok.text.encode(data.names[label]))
            ids = tok.grammar.encode([picture, name]).numpy()
            layout = layouts(structure_of([picture, name]), ids)
            corpus.documents.append(PlacedDocument(ids, layout))
            corpus.picture_ids.append(tok.grammar.length(picture))
    return corpus


def halves(batch: Batch) -> Tensor:
    """Loss weights (B, T): the ids of the name and those of the picture weigh 1 in all."""
    predicted = batch.loss_weight > 0
    name = predicted & (batch.modality == TEXT)
    parts = (part.float() for part in (name, predicted & ~name))
    return torch.stack([part / part.sum(1, keepdim=True) for part in parts]).sum(0)


def trained(tok: UnifiedTokenizer, corpus: Corpus, steps: int, size: int) -> UnifiedLM:
    """A decoder after `steps` steps of `size` documents."""
    torch.manual_seed(0)
    lm = UnifiedLM(dataclasses.replace(SHAPE, vocab_size=tok.vocabulary.padded_size))
    (optimizer,) = build_optimizers(lm, OPTIMIZER)
    weights, pad = LossWeights(tok.vocabulary), tok.vocabulary.marker("<pad>")
    rng, count = torch.Generator().manual_seed(0), len(corpus.documents)
    passes = -(-steps * size // count)
    line = torch.cat([torch.randperm(count, generator=rng) for _ in range(passes)])
    for step, chosen in enumerate(line[: steps * size].split(size)):
        rows = [[corpus.documents[index]] for index in chosen]
        longest = max(len(document.ids) for (document,) in rows)
        batch = collate(rows, longest, weights, pad)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = lm.hidden(
                batch.ids[:, :-1], batch.positions[:, :, :-1], batch.segment_ids[:, :-1]
            )
            weight = halves(batch)[:, 1:].flatten()
            loss = head_loss(lm, hidden.flatten(0, 1), batch.ids[:, 1:].flatten(), weight, 1e-5)
        optimizer.zero_grad()
        loss.loss.backward()
        clip_gradients(list(lm.parameters()), OPTIMIZER.clip)
        set_learning_rate(optimizer, OPTIMIZER.factor(step, steps))
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {float(loss.loss.detach()):.3f}", flush=True)
    return lm.eval()


def measure(
    path: str, train: Labelled, test: Labelled, steps: int, size: int
) -> tuple[dict[str, Any], list[float]]:
    """Figures of one codec, and of each test picture whether its name was found, 1 or 0."""
    codec = load_codec(path)
    tok = UnifiedTokenizer(TextModel.train(train.names, PIECES), [codec])
    start = time.process_time()
    corpus = written(tok, codec, train)
    coded = time.process_time()
    lm = trained(tok, corpus, steps, size)
    learned = time.process_time()
    names = [[name] for name in test.names]
    guesses = [classify(lm, tok, [item], names).index for item in items(codec, test.pictures)]
    right = torch.tensor(guesses) == test.labels
    row = {
        "codec": Path(path).name,
        "codes": codec.codebook_size,
        "ids": float(torch.tensor(corpus.picture_ids).double().mean()),
        "parameters": lm.num_parameters,
        "accuracy": share(right),
        "coding_ms": 1000 * (coded - start) / len(train.labels),
        "step_ms": 1000 * (learned - coded) / steps,
    }
    return row, right.double().tolist()


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown of what was measured."""
    first = rows[0]
    lines = [
        [
            row["codec"],
            f"{row['codes']:,}",
            f"{row['ids']:.1f}",
            f"{row['ids'] / first['ids']:.1f}",
            f"{row['parameters']:,}",
            interval(row["accuracy"], ".1%"),
            f"{row['coding_ms']:.0f}",
            f"{row['step_ms']:.0f}",
        ]
        for row in rows
    ]
    head = ["codec", "codes", "ids of a picture", "times", "decoder", "right names", "coding, ms"]
    parts = [table([*head, "step, ms"], lines)]
    lines = [
        [row["codec"], "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["first_less"])]
        for row in rows[1:]
    ]
    parts.append(table([f"{first['codec']} less, the same pictures", "mean, 95% interval"], lines))
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("codecs", nargs="+", help="folders or names; the first is compared")
    parser.add_argument("--data", default="runs/semantic/raw", help="see recipes/semantic/data.md")
    parser.add_argument("--train", type=int, default=16000, help="pictures")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64, help="documents of a step")
    parser.add_argument("--note", default="", help="about machine and codecs, for the page's head")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    unseen = load(f"{options.data}/cifar/cifar-val-000000.tar", 10**6)
    test = unseen._replace(
        pictures=unseen.pictures[: options.test], labels=unseen.labels[: options.test]
    )
    shards = f"{options.data}/cifar/cifar-train-00000{{0..3}}.tar"
    train = load(shards, options.train, test.names)
    machine = f"cpu-{platform.machine()}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    steps = f"{options.steps} steps of {options.batch_size} of {len(train.labels)} documents"
    head = f"{machine}, {threads}, torch {torch.__version__}. {steps}. {options.note}".strip()
    path = options.out / f"{datetime.now(UTC).date()}-{machine}-semantic-lm"
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    for codec in options.codecs:  # the page is whole after each: the last may take an hour
        row, right = measure(codec, train, test, options.steps, options.batch_size)
        first = first or right
        rows.append({**row, "first_less": paired_difference(first, right)._asdict()})
        write_json(path.with_suffix(".json"), {"head": head, "results": rows})
        text = f"# Semantic and raster codes, read by a decoder\n\n{head}\n\n{page(rows)}"
        write_text(path.with_suffix(".md"), text)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
