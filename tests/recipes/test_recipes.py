"""Every committed recipe: its files fit together, and each of them really trains a step."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unimm import UnifiedLM, UnifiedTokenizer, generate, load_codec
from unimm.data import dialpad
from unimm.data.templates import check_templates, load_templates, modality_of_field
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import tokenize_shards
from unimm.data.worlds import assemble_tokenizer
from unimm.evaluation.recipe import Recipe, load_recipe
from unimm.training.export import export
from unimm.training.launch import launch

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/recipe.yaml"))
TRAININGS = sorted(
    path for path in RECIPES.glob("*/*.yaml") if "trainer" in yaml.safe_load(path.read_text())
)
SMALL = {
    "trainer.max_steps": 1,
    "trainer.val_check_interval": 1,
    "trainer.limit_val_batches": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.callbacks": [],
    "data.init_args.batch_size": 4,
}
Train = Callable[[Path], Path]


def changed(path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A training recipe with some keys, named by dotted path, set."""
    recipe = yaml.safe_load(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = recipe
        for parent in parents:
            node = node[parent]
        node[last] = value
    return recipe


def train(path: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """One step of a training recipe; returns the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / path.name
    own = {**SMALL, "trainer.default_root_dir": str(folder / "run"), **changes}
    written.write_text(yaml.safe_dump(changed(path, own)))
    launch(["-c", str(written)])
    return folder / "run"


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of the dial-pad world: real digits come as files of the same kinds."""
    folder = tmp_path_factory.mktemp("recipes") / "raw"
    dialpad.write_raw_shards(folder, 12, seed=0)
    return folder


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory, raw: Path) -> Train:
    """A codec folder from a training recipe, each trained once, for one step."""
    made: dict[Path, Path] = {}

    def train_once(path: Path) -> Path:
        if path not in made:
            folder = tmp_path_factory.mktemp("codec")
            changes: dict[str, Any] = {
                "data.init_args.shards": str(raw),
                "data.init_args.val_shards": str(raw),
            }
            if "video" in yaml.safe_load(path.read_text())["data"]["init_args"]["config"]:
                changes["data.init_args.config.video_batch_size"] = 2
            made[path] = export(train(path, folder, changes), folder / "codec")
        return made[path]

    return train_once


def test_all_recipes_are_found() -> None:
    assert {"dialpad", "digits"} <= set(NAMES)
    assert len(TRAININGS) >= 3 * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_found_by_name_and_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(RECIPES / name)
    assert recipe.title
    assert recipe.folder.resolve() == RECIPES / name
    steps = {recipe.templates, recipe.model, *recipe.codecs.values()}
    named = {*steps, "recipe.yaml", "debug.yaml"}
    assert {path.name for path in (RECIPES / name).glob("*.yaml")} == named


@pytest.mark.parametrize("name", NAMES)
def test_every_direction_is_written_and_taught(name: str) -> None:
    recipe = load_recipe(name)
    taught = set()
    templates = load_templates(recipe.file(recipe.templates))
    check_templates(templates, ("text", "image", "video", "audio"))
    for template in templates:
        kinds = [modality_of_field(piece.field) for piece in template.pieces if piece.field]
        taught |= set(itertools.pairwise(kinds))
        # Guidance compares with what is written without a condition.
        assert kinds[-1] == "text" or template.drop_condition > 0
    assert {(way.source, way.target) for way in recipe.directions} <= taught
    assert {way.target for way in recipe.directions} <= recipe.generation.keys()
    modalities = {
        yaml.safe_load(recipe.file(file).read_text())["data"]["init_args"]["config"]["modality"]
        for file in recipe.codecs.values()
    }
    served = {part for modality in modalities for part in modality.split("+")}
    assert {part for pair in taught for part in pair} == {"text", *served}


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_training_keeps_everything_in_the_recipes_own_run(path: Path) -> None:
    """Started by `unimm fit` alone, the steps of a recipe find each other's files."""
    text = path.read_text()
    places = re.findall(r"runs/(\S+)", text)
    assert places
    assert all(place.startswith(f"{path.parent.name}/") for place in places)
    assert yaml.safe_load(text)["seed_everything"] == 0


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_misspelled_key_is_named_with_a_hint(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    for right, wrong in (("learning_rate", "learning_rat"), ("batch_size", "batchsize")):
        broken = tmp_path / f"{wrong}.yaml"
        broken.write_text(re.sub(rf"^( +){right}:", rf"\1{wrong}:", text, count=1, flags=re.M))
        with pytest.raises(ValueError, match=rf"{wrong}\.yaml: unknown key .*{wrong}") as caught:
            launch(["-c", str(broken)])
        assert f"(did you mean '{right}'?)" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "modality"),
    [(name, modality) for name in NAMES for modality in load_recipe(name).codecs],
)
def test_a_codec_trains_and_is_exported(name: str, modality: str, codec: Train) -> None:
    recipe = load_recipe(name)
    made = load_codec(codec(recipe.file(recipe.codecs[modality])))
    assert made.modality == modality
    config = yaml.safe_load(recipe.file(recipe.codecs[modality]).read_text())["data"]["init_args"]
    assert made.num_channels == config["config"]["num_channels"]
    shape = (config["config"].get("length"),)
    if modality == "image":
        shape = (config["config"]["size"],) * 2
    signal = torch.rand(1, made.num_channels, *shape) * 2 - 1
    assert made.decode(made.encode(signal), shape).shape == signal.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_trains_on_the_recipes_documents(
    name: str, codec: Train, raw: Path, tmp_path: Path
) -> None:
    recipe: Recipe = load_recipe(name)
    folders = [codec(recipe.file(file)) for file in recipe.codecs.values()]
    tokenizer, tokens = tmp_path / "tokenizer", tmp_path / "tokens"
    assemble_tokenizer(folders, raw, tokenizer, audio_layout=recipe.audio_layout)
    config = TokenizeConfig(documents_per_sample=recipe.documents_per_sample)
    templates = load_templates(recipe.file(recipe.templates))
    summary = tokenize_shards(raw, tokens, tokenizer, templates, config, progress=False)
    assert summary.documents == 12 * recipe.documents_per_sample
    run = train(
        recipe.file(recipe.model),
        tmp_path / "lm",
        {
            "model.init_args.tokenizer": str(tokenizer),
            "model.init_args.compile_blocks": False,
            "data.init_args.tokenizer": str(tokenizer),
            "data.init_args.shards": str(tokens),
            "data.init_args.val_shards": str(tokens),
        },
    )
    bundle = export(run, tmp_path / "bundle", tokenizer, torch.float16)
    lm, tok = UnifiedLM.from_pretrained(bundle), UnifiedTokenizer.from_pretrained(bundle)
    # The rows hold every document of the recipe.
    longest = yaml.safe_load(recipe.file(recipe.model).read_text())["data"]["init_args"]
    scene = dialpad.make_scene(0, 0)
    pairs = [[scene.caption, scene.image], [scene.film_caption, scene.video]]
    pairs += [[scene.image, scene.audio], [scene.caption, scene.audio]]
    assert max(len(tok.encode(pair)) for pair in pairs) <= longest["row_length"]
    ((answer,),) = generate(lm, tok, ["seven"], "image", size=(32, 32), seed=0)
    assert answer.size == (32, 32)  # type: ignore[union-attr]
