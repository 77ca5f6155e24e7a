"""Recipe folders: what is read, and mistakes that are told before anything is trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from unimm.evaluation.recipe import find_recipe, load_recipe

WriteRecipe = Callable[..., Path]
WHOLE: dict[str, Any] = {
    "title": "a recipe",
    "world": "dialpad",
    "train": 8,
    "val": 4,
    "codecs": {"image": "image.yaml"},
    "templates": "templates.yaml",
    "documents_per_sample": 2,
    "model": "lm.yaml",
    "generation": {"image": {"temperature": 0.9, "guidance": 3.0}},
    "directions": [
        {"source": "text", "target": "image", "goal": 0.5, "options": {"size": [32, 32]}},
        {"source": "image", "target": "text"},
    ],
    "samples": 3,
}
FIRST = {"source": "text", "target": "image"}
WRONG = [
    ({"folder": "elsewhere"}, "recipe.yaml: unknown key 'folder'"),
    ({"sampels": 3}, "recipe.yaml: unknown key 'sampels' (did you mean 'samples'?)"),
    ({"samples": None}, "recipe.yaml: samples must be a whole number above 0, got None"),
    ({"train": 0}, "recipe.yaml: train must be a whole number above 0, got 0"),
    ({"val": "many"}, "recipe.yaml: val must be a whole number above 0, got 'many'"),
    (
        {"world": "dialpat"},
        "recipe.yaml: world: 'dialpat' is none of dialpad, digits (did you mean 'dialpad'?)",
    ),
    ({"audio_layout": "frames"}, "audio_layout: 'frames' is none of frame, level"),
    ({"codecs": ["image.yaml"]}, "recipe.yaml: codecs must map modalities"),
    ({"codecs": {"image": "imag.yaml"}}, "recipe.yaml: names imag.yaml, but there is no "),
    ({"templates": "template.yaml"}, "recipe.yaml: names template.yaml, but there"),
    ({"model": "llm.yaml"}, "recipe.yaml: names llm.yaml, but there is no "),
    ({"directions": []}, "recipe.yaml: directions: list at least one"),
    ({"directions": "text->image"}, "recipe.yaml: directions: list at least one"),
    ({"directions": ["text->image"]}, "recipe.yaml: direction 1: expected keys and values"),
    ({"directions": [FIRST, {"source": "text"}]}, "direction 2: key 'target' is missing"),
    (
        {"directions": [{**FIRST, "gaol": 1}]},
        "recipe.yaml: direction 1: unknown key 'gaol' (did you mean 'goal'?)",
    ),
    ({"directions": [{**FIRST, "goal": 90}]}, "recipe.yaml: direction 1: text->image: goal must"),
    ({"directions": [{**FIRST, "goal": "high"}]}, "recipe.yaml: direction 1: "),
    (
        {"directions": [{"source": "txt", "target": "image"}]},
        "direction txt->image: 'txt' is none of text, image, audio, video (did you mean 'text'?)",
    ),
    ({"directions": [{**FIRST, "target": "semantic"}]}, "'semantic' is none of text, image"),
    (
        {"directions": [{**FIRST, "options": {"temprature": 1}}]},
        "direction text->image: unknown key 'temprature' (did you mean 'temperature'?)",
    ),
    (
        {"generation": {"imag": {}}},
        "recipe.yaml: generation: 'imag' is none of text, image, video, audio, semantic, any",
    ),
    (
        {"generation": {"image": {"guidence": 3.0}}},
        "generation of image: unknown key 'guidence' (did you mean 'guidance'?)",
    ),
    ({"generation": {"image": {"top_p": 2}}}, "recipe.yaml: generation of image: top_p must lie"),
    ({"conversations": -1}, "conversations must be a whole number, got -1"),
    (
        {"conversations": 4, "world": "digits"},
        "conversations: only the world dialpad has any",
    ),
    ({"generation": {"image": 3}}, "generation of image: expected keys and values, got 3"),
]


@pytest.fixture
def write(tmp_path: Path) -> WriteRecipe:
    """A whole recipe folder, with some keys changed."""

    def write_folder(**changes: Any) -> Path:
        for name in ("image.yaml", "templates.yaml", "lm.yaml"):
            (tmp_path / name).write_text("{}\n")
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**WHOLE, **changes}))
        return tmp_path

    return write_folder


def test_a_recipe_is_read(write: WriteRecipe) -> None:
    folder = write()
    recipe = load_recipe(folder)
    assert (recipe.folder, recipe.world, recipe.train, recipe.samples) == (folder, "dialpad", 8, 3)
    assert recipe.audio_layout == "frame"
    assert recipe.file("lm.yaml") == folder / "lm.yaml"
    first, second = recipe.directions
    assert (first.name, first.goal, first.options) == ("text->image", 0.5, {"size": (32, 32)})
    assert (second.name, second.goal, dict(second.options)) == ("image->text", None, {})
    assert recipe.generation["image"] == {"temperature": 0.9, "guidance": 3.0}


@pytest.mark.parametrize(("changes", "told"), WRONG)
def test_a_wrong_recipe_is_one_line(write: WriteRecipe, changes: dict[str, Any], told: str) -> None:
    folder = write(**changes)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_recipe(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    assert message.count("recipe.yaml") == 1


@pytest.mark.parametrize("key", [key for key in WHOLE if key != "title"])
def test_a_missing_key_is_named(write: WriteRecipe, key: str) -> None:
    folder = write()
    rest = {name: value for name, value in WHOLE.items() if name != key}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(rest))
    with pytest.raises(ValueError, match=rf"recipe\.yaml: key '{key}' is missing"):
        load_recipe(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("world: [1", "not valid YAML"),
        ("", "expected keys and values"),
        ("- world", "expected keys and values"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {told}") as caught:
        load_recipe(tmp_path)
    assert "\n" not in str(caught.value)


def test_recipes_are_found_by_path_and_by_name(write: WriteRecipe, tmp_path: Path) -> None:
    assert find_recipe(write()) == tmp_path
    assert find_recipe("dialpad").name == "dialpad"
    with pytest.raises(ValueError, match=r"no recipe 'digts': .* \(did you mean 'digits'\?\)"):
        find_recipe("digts")
