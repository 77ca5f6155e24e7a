"""Recipes that train in a second, as data; tests change single keys."""

import copy
import csv
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # for the processes of a run, which import `faults` by name
    sys.path.insert(0, HERE)

import faults  # noqa: E402  # found by the path above

Recipe = dict[str, Any]


def _task(codec: str, config: Recipe, objective: str) -> Recipe:
    return {
        "class_path": "unimm.training.CodecTask",
        "init_args": {
            "codec": {"class_path": f"unimm_tokenizers.{codec}", "init_args": {"config": config}},
            "objective": {"class_path": f"unimm_tokenizers.losses.{objective}"},
            "optimizer": {"learning_rate": 2e-3, "warmup": 2},
        },
    }


def _signals(shards: Path, config: Recipe) -> Recipe:
    return {
        "class_path": "unimm.data.module.SignalDataModule",
        "init_args": {
            "shards": str(shards),
            "val_shards": str(shards),
            "batch_size": 8,
            "config": config,
        },
    }


def _trainer(run: Path) -> Recipe:
    return {
        "default_root_dir": str(run),
        "max_steps": 6,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
        "val_check_interval": 6,
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe with some keys changed, named by dotted path; None removes a key."""

    def write(recipe: Recipe, **changes: Any) -> Path:
        changed = copy.deepcopy(recipe)
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            node = changed
            for parent in parents:
                node = node[parent]
            node[last] = value
            if value is None:
                del node[last]
        path = tmp_path / f"recipe-{len(list(tmp_path.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(changed))
        return path

    return write


@pytest.fixture
def image_recipe(tmp_path: Path, raw_shards: Path) -> Recipe:
    """A codec for pictures and films."""
    vision = {
        "channels": 8,
        "multipliers": [1, 2],
        "patch": 4,
        "time_downsample": 4,
        "latent_channels": 8,
        "fsq_levels": [4, 4],
    }
    signals = {
        "modality": "image+video",
        "size": 32,
        "frames": 5,
        "video_share": 0.25,
        "video_batch_size": 2,
    }
    return {
        "seed_everything": 0,
        "model": _task("vision.VisionCodec", vision, "PictureObjective"),
        "data": _signals(raw_shards, signals),
        "trainer": _trainer(tmp_path / "image"),
    }


@pytest.fixture
def audio_recipe(tmp_path: Path, raw_shards: Path) -> Recipe:
    """A codec for sounds."""
    spectral = {"channels": 16, "num_blocks": 1, "num_codebooks": 2, "codebook_size": 16}
    signals = {"modality": "audio", "num_channels": 1, "sample_rate": 8000, "length": 3200}
    return {
        "seed_everything": 0,
        "model": _task("audio.SpectralCodec", spectral, "SpectrumObjective"),
        "data": _signals(raw_shards, signals),
        "trainer": _trainer(tmp_path / "audio"),
    }


@pytest.fixture
def language_recipe(tmp_path: Path, tokenizer_bundle: Path, token_shards: Path) -> Recipe:
    """A decoder trained by AdamW and Muon, at a learning rate that does not fall."""
    optimizer = {"learning_rate": 3e-3, "matrices": "muon", "warmup": 2, "decay": 0.01}
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "unimm.training.LanguageTask",
            "init_args": {
                "tokenizer": str(tokenizer_bundle),
                "model": {"d_model": 32, "num_layers": 1, "num_heads": 2},
                "optimizer": optimizer,
            },
        },
        "data": {
            "class_path": "unimm.data.module.TokenDataModule",
            "init_args": {
                "tokenizer": str(tokenizer_bundle),
                "shards": str(token_shards),
                "val_shards": str(token_shards),
                "row_length": 128,
                "batch_size": 4,
                "loss_weight": {"text": 2.0},
            },
        },
        "trainer": _trainer(tmp_path / "lm"),
    }


class Ranks:
    """Runs `unimm` in several processes at once, as torchrun would start them.

    They are forked from a server that has imported everything and done nothing, so that a process
    takes a fraction of a second to start instead of five.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        preloaded = ["faults", "unimm.training.launch", "unimm.data.module"]
        self._context.set_forkserver_preload(preloaded)
        with pytest.MonkeyPatch.context() as patched:
            # Python 3.11 does not hand sys.path to the server, and preloads nothing without it.
            patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()

    def start(self, world: int, *arguments: str, **environment: str) -> list[Any]:
        """The processes of a run of `unimm ARGUMENTS`; with one of them, no process group."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(world):
            variables = {"OMP_NUM_THREADS": "1", **environment}
            if world > 1:
                variables |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "GROUP_RANK": "0",
                    "TORCHELASTIC_RUN_ID": "test",
                }
            log = str(self._folder / f"rank-{rank}.log")
            process = self._context.Process(
                target=faults.process, args=(variables, list(arguments), log)
            )
            process.start()
            started.append(process)
        return started

    def finish(self, started: list[Any], timeout: float = 240) -> list[int]:
        """Their exit codes; a process that hangs fails the test, with what it wrote last."""
        end = time.monotonic() + timeout
        for process in started:
            process.join(max(0.1, end - time.monotonic()))
        hung = [process for process in started if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"{len(hung)} processes hang: {self.log()}"
        return [int(process.exitcode or 0) for process in started]

    def run(self, world: int, *arguments: str, **environment: str) -> list[int]:
        """Exit codes of a whole run."""
        return self.finish(self.start(world, *arguments, **environment))

    @contextmanager
    def writing(self, path: str, temporary: str) -> Iterator[Any]:
        """A process that has written a checkpoint three times and goes on."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=faults.write, args=(path, temporary, there))
        process.start()
        try:
            for _ in range(3):
                assert here.poll(60)
                here.recv()
            yield process
        finally:
            process.kill()
            process.join()
            here.close()
            there.close()

    def log(self, rank: int = 0) -> str:
        """The end of what a process wrote."""
        return (self._folder / f"rank-{rank}.log").read_text()[-6000:]


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


@pytest.fixture
def losses() -> Callable[[Path], dict[int, str]]:
    """Step -> training loss, every digit of it, of a run's CSV log."""

    def read(run: Path) -> dict[int, str]:
        with (run / "logs/metrics.csv").open() as file:
            return {
                int(r["step"]): r["train/loss"] for r in csv.DictReader(file) if r["train/loss"]
            }

    return read
