"""Recipes for one machine and for many: shapes on the meta device, debug runs, launch files."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unimm import ModelConfig, UnifiedLM
from unimm.data import dialpad
from unimm.data.templates import load_templates
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import tokenize_shards
from unimm.model import preset, size_of
from unimm.training import OptimizerConfig, ScaleConfig
from unimm.training.launch import launch
from unimm.training.pod import exit_code, main

RECIPES = Path(__file__).parents[2] / "recipes"
LAUNCHED = sorted(path.parent.name for path in RECIPES.glob("*/launch"))
# A codec's losses do not begin at chance; its debug run is tested with the codecs'.
DECODERS = [
    name for name in LAUNCHED if "LanguageTask" in (RECIPES / name / "debug.yaml").read_text()
]
FILES = {"local.sh", "slurm.sbatch", "sky.yaml", "jobset.yaml", "trainjob.yaml"}
MODELS = sorted(
    path
    for path in RECIPES.glob("*/*.yaml")
    if "LanguageTask" in path.read_text() and "model" in yaml.safe_load(path.read_text())
)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def shape_of(path: Path) -> ModelConfig:
    """The decoder of a recipe, over 65,536 ids."""
    given = read(path)["model"]["init_args"]["model"]
    if isinstance(given, str):
        return preset(given, vocab_size=65536)
    return ModelConfig(vocab_size=65536, **given)


def test_every_recipe_has_all_parts() -> None:
    assert DECODERS == ["dialpad", "digits", "photos", "pod-1b", "pod-350m", "pod-8b"]
    assert ["audio", *DECODERS, "semantic"] == LAUNCHED
    for name in LAUNCHED:
        assert {path.name for path in (RECIPES / name / "launch").iterdir()} == FILES
        for part in ("debug.yaml", "data.md", "expected.json", "README.md"):
            assert (RECIPES / name / part).is_file(), f"{name}/{part}"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_decoder_is_built_without_its_weights(path: Path) -> None:
    config = shape_of(path)
    with torch.device("meta"):
        lm = UnifiedLM(config)
    assert lm.num_parameters == size_of(config).parameters
    settings = read(path)["model"]["init_args"]
    optimizer = dict(settings["optimizer"])
    OptimizerConfig(**optimizer)
    ScaleConfig(**settings.get("scale") or {})


@pytest.mark.parametrize("name", ["pod-350m", "pod-1b", "pod-8b"])
def test_a_pods_shards_fit_into_its_gpus(name: str) -> None:
    """Weights, gradients and two moments in float32, an average, and one gathered block: 80 GB."""
    recipe = read(RECIPES / name / "config.yaml")
    size = size_of(shape_of(RECIPES / name / "config.yaml"))
    trainer = recipe["trainer"]
    gpus = trainer["devices"] * trainer["num_nodes"]
    cut = gpus if isinstance(trainer["strategy"], dict) else 1
    assert size.parameters * 4 * 5 / cut < 40e9
    row_length = recipe["data"]["init_args"]["row_length"]
    assert row_length <= 4096
    wanted = {"pod-350m": 0.371e9, "pod-1b": 1.349e9, "pod-8b": 7.516e9}[name]
    assert size.parameters == pytest.approx(wanted, rel=0.001)
    deferred = recipe["model"]["init_args"]["scale"]["deferred"]
    assert deferred == (cut > 1)


# Debug runs


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What data.md of every recipe makes for its debug run."""
    folder = tmp_path_factory.mktemp("debug")
    dialpad.write_raw_shards(folder / "raw", 300, seed=0)
    templates = load_templates(RECIPES / "dialpad" / "templates.yaml")
    tokenize_shards(
        folder / "raw", folder / "tokens", "dialpad", templates, TokenizeConfig(), progress=False
    )
    return folder / "tokens"


@pytest.mark.parametrize("name", DECODERS)
def test_a_debug_run_learns_what_is_expected(
    name: str, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)  # recipes name their expected.json from there
    cli = launch(
        [
            *("-c", str(RECIPES / name / "debug.yaml")),
            *("--trainer.default_root_dir", str(tmp_path)),
            *("--data.init_args.shards", str(tokens)),
            *("--data.init_args.val_shards", str(tokens)),
            *("--trainer.enable_progress_bar", "false"),
        ]
    )
    assert cli.trainer.global_step == 20
    expected = json.loads((RECIPES / name / "expected.json").read_text())
    assert {"1", "10", "20"} == set(expected["losses"])
    assert expected["losses"]["20"] < 0.95 * expected["losses"]["1"]
    assert (tmp_path / "checkpoints/final.ckpt").is_file()


@pytest.mark.parametrize("name", DECODERS)
def test_expected_losses_begin_at_chance(name: str) -> None:
    held = json.loads((RECIPES / name / "expected.json").read_text())
    assert 0 < held["tolerance"] <= 0.2
    assert 0.8 * math.log(500) < held["losses"]["1"] < 1.2 * math.log(3000)
    assert held["measured"]["device"]


# Launch files


def config_of(text: str) -> str:
    found = re.search(r"recipes/(\S+/[\w-]+\.yaml)", text)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_launch_file_starts_its_own_recipe(name: str) -> None:
    for file in FILES:
        text = (RECIPES / name / "launch" / file).read_text()
        config = config_of(text.replace("recipes/" + name + "/launch", ""))
        assert config.split("/")[0] == name, file
        assert (RECIPES / config).is_file(), file
        assert "unimm" in text


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("file", ["local.sh", "slurm.sbatch"])
def test_shell_files_are_well_formed(name: str, file: str) -> None:
    path = RECIPES / name / "launch" / file
    shell = "sh" if file == "local.sh" else "bash"
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if file == "local.sh":
        assert os.access(path, os.X_OK)


@pytest.mark.parametrize("name", LAUNCHED)
def test_slurm_jobs_are_warned_and_come_back(name: str) -> None:
    text = (RECIPES / name / "launch/slurm.sbatch").read_text()
    for line in ("#SBATCH --signal=SIGUSR1@120", "#SBATCH --requeue", "-eq 75 ]; then scontrol"):
        assert line in text
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    trainer = read(RECIPES / config_of(text))["trainer"]
    assert int(options["nodes"]) == trainer.get("num_nodes", 1)
    devices = trainer.get("devices", 1)
    assert int(options["ntasks-per-node"]) == devices  # one process per GPU, signalled itself


def processes(arguments: list[str]) -> dict[str, str]:
    """torchrun's options, as `unimm.training.pod` gets them."""
    given = arguments[: arguments.index("--")]
    split = [part for argument in given for part in argument.split("=", 1)]
    return dict(zip(split[::2], split[1::2], strict=True))


@pytest.mark.parametrize("name", LAUNCHED)
def test_sky_tasks_recover_from_preemption(name: str) -> None:
    task = read(RECIPES / name / "launch/sky.yaml")
    trainer = read(RECIPES / config_of(task["run"]))["trainer"]
    assert task["num_nodes"] == trainer.get("num_nodes", 1)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "SKYPILOT_NODE_RANK" in task["run"]
    accelerators = task["resources"].get("accelerators", "none:1")
    assert int(accelerators.split(":")[1]) == trainer.get("devices", 1)


@pytest.mark.parametrize("name", LAUNCHED)
def test_jobsets_have_time_to_save_and_know_the_exit_codes(name: str) -> None:
    job = read(RECIPES / name / "launch/jobset.yaml")
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] >= 120
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [76]
    assert rules[1] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    (shm,) = [v for v in pod["volumes"] if v["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"
    (command,) = container["args"]
    trainer = read(RECIPES / config_of(command))["trainer"]
    assert spec["parallelism"] == spec["completions"] == trainer.get("num_nodes", 1)
    arguments = command.split()
    found = processes(arguments[arguments.index("unimm.training.pod") + 1 :])
    assert found["--nproc-per-node"] == str(trainer.get("devices", 1))
    limits = container["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", trainer.get("devices", 1)) == trainer.get("devices", 1)
    # JobSet gives pod 0 of this job this name, in a headless service of the set's name.
    assert found["--master-addr"] == f"{name}-node-0-0.{job['metadata']['name']}"


@pytest.mark.parametrize("name", LAUNCHED)
def test_trainjobs_are_those_of_kubeflow_trainer_2(name: str) -> None:
    job = read(RECIPES / name / "launch/trainjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    recipe = read(RECIPES / config_of(" ".join(trainer["args"])))["trainer"]
    assert trainer["numNodes"] == recipe.get("num_nodes", 1)
    assert "numProcPerNode" not in trainer  # gone since Trainer 2.2
    assert processes(trainer["args"])["--nproc-per-node"] == str(recipe.get("devices", 1))


# torchrun for unimm


@pytest.mark.parametrize(
    ("codes", "expected"), [({75}, 75), ({75, 1}, 75), ({76, 75}, 76), ({1}, 1), ({-9, 1}, 1)]
)
def test_a_node_ends_with_what_its_processes_say(codes: set[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_options_need_their_border(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc-per-node", "2", "fit"]) == 2
    assert "put -- between" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["pod-350m/launch/local.sh"])
def test_shellcheck_has_nothing_to_say(file: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(RECIPES / file)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shapes_are_plain_data() -> None:
    config = shape_of(RECIPES / "pod-8b/config.yaml")
    assert ModelConfig(**dataclasses.asdict(config)) == config
