"""Every configuration file is composed and checked; mistakes in one are errors that name the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import yaml
from nearfield import list_models
from nearfield.engine import check, door, fit
from nearfield.engine.config import EvalConfig, TaskConfig, TrainConfig
from nearfield.engine.dense.crops import ADE20K_SCALE, segmentation_policy
from nearfield.engine.errors import ConfigError

FILES = sorted(door.CONFIGS.rglob("*.yaml"))
GROUPS = sorted({path.parent.name for path in FILES if path.parent != door.CONFIGS} - {"local"})
# test_recipes.py has those for COCO and ADE20K
EXPERIMENTS = sorted(
    path.stem for path in (door.CONFIGS / "experiment").glob("*.yaml") if not path.stem.endswith(("_coco", "_ade20k"))
)


class Recipe(NamedTuple):
    """What a recipe's authors publish and every kind of schedule has; the rate is for a batch of ``size``."""

    epochs: int
    rate: float
    size: int
    schedule: str
    warmup: float
    decay: float
    clip: float | None


# SHI-Labs' train.py and configs; Swin's and SwinV2's config.py; BiFormer's scripts/train.sh; MaxViT's hp/vision_i1k.py;
# HaloNet's paper. HWT and HNT publish none: they have those of Swin and NAT
_NAT = Recipe(300, 1e-3, 1024, "cosine", 20, 0.05, 5.0)
_SWIN = Recipe(300, 5e-4, 512, "cosine", 20, 0.05, 5.0)
RECIPES = {
    **dict.fromkeys(("nat", "dinat", "hnt"), _NAT),
    **dict.fromkeys(("swin", "hwt"), _SWIN),
    "biformer": Recipe(300, 5e-4, 512, "cosine", 5, 0.05, None),
    "maxvit": Recipe(300, 3e-3, 4096, "cosine", 32, 0.05, 1.0),
    "halo": Recipe(350, 0.1, 256, "cosine", 10, 8e-5, None),
}
_SWIN_FINETUNING = Recipe(30, 2e-5, 512, "cosine", 5, 1e-8, 5.0)
FINETUNING = {
    # a straight line: a polynomial of power 1
    "dinat": Recipe(30, 5e-5, 512, "poly", 0, 1e-10, 5.0),
    "swin": _SWIN_FINETUNING,
    "swinv2": _SWIN_FINETUNING,
    "maxvit": Recipe(30, 5e-5, 512, "constant", 0, 1e-8, 1.0),
}
# of the last block, by the size in a model's name; from scratch
DROP_PATH = {
    "biformer": {"tiny": 0.1, "small": 0.15, "stl": 0.1},
    "maxvit": {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6},
    "halo": {"h1": 0.0},
}
FINETUNED_DROP_PATH = {
    "dinat_large_384": 0.35,
    "swin_base_384": 0.5,
    "maxvit_tiny_384": 0.2,
    **{f"swinv2_{size}_window{window}_22k": 0.2 for size in ("base", "large") for window in (16, 24)},
}
_DROP_PATH = {"mini": 0.2, "tiny": 0.2, "small": 0.3, "base": 0.5}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (door.CONFIGS / group).glob("*.yaml"))


def test_the_groups_are_those_of_the_design() -> None:
    wanted = "model data optim sched aug task demo finetune trainer logger paths hardware experiment debug"
    assert set(GROUPS) == set(wanted.split())
    assert set(options("debug")) == {"fdr", "overfit", "limit", "profiler"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(door.CONFIGS)))
def test_a_file_opens_with_a_comment_that_says_what_it_is(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(door.CONFIGS)))
def test_a_file_is_composed_and_checked(path: Path) -> None:
    group = path.parent.name
    if path.parent == door.CONFIGS:
        kind = {"eval": EvalConfig}.get(path.stem, TrainConfig)
        config = door.compose("eval" if kind is EvalConfig else "train", kind)
    else:
        # these come with their task
        task, _, data = path.stem.partition("_")
        arguments = {"demo": [f"task={task}"], "finetune": [f"task={task}", f"data={data or 'coco'}"]}
        config = door.compose("train", TrainConfig, arguments.get(group, [f"{group}={path.stem}"]))
    again = check.build(type(config), yaml.safe_load(door.to_yaml(config)))
    assert again == config


@pytest.mark.parametrize("group", ["data", "hardware", "paths", "task", "model"])
def test_eval_takes_every_option_of_its_groups(group: str) -> None:
    for option in options(group):
        assert isinstance(door.compose("eval", EvalConfig, [f"{group}={option}"]), EvalConfig)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_full_recipe_with_its_source(name: str) -> None:
    text = (door.CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert "# Source: github.com/" in text or "# Source: arxiv.org/abs/" in text
    config = door.compose("train", TrainConfig, [f"+experiment={name}"])
    assert config.model.name in list_models()
    assert config.model.name == name.removesuffix("_imagenet").removesuffix("_finetune")
    if name.endswith("_finetune"):
        assert config.model.drop_path_rate == FINETUNED_DROP_PATH[name.removesuffix("_finetune")]
    else:
        family, size = name.replace("dinat_s_", "dinat_").split("_")[:2]
        assert config.model.drop_path_rate == DROP_PATH.get(family, _DROP_PATH)[size]
    assert config.data.name == "folder"
    recipe = RECIPES[max((start for start in RECIPES if name.startswith(start)), key=len)]
    if name.endswith("_finetune"):
        recipe = FINETUNING[name.split("_")[0]]
    optim, sched, trainer = config.optim, config.sched, config.trainer
    assert recipe == Recipe(
        trainer.epochs,
        optim.lr,
        optim.lr_base_size,
        sched.name,
        sched.warmup_epochs,
        optim.weight_decay,
        trainer.clip_grad,
    )


def test_the_experiments_are_those_that_were_promised() -> None:
    wanted = {f"{family}_{size}_imagenet" for family in ("nat", "dinat") for size in ("mini", "tiny", "small", "base")}
    wanted |= {f"{family}_{size}_imagenet" for family in ("dinat_s", "swin") for size in ("tiny", "small", "base")}
    wanted |= {f"swinv2_{size}_window{n}_imagenet" for size in ("tiny", "small", "base") for n in (8, 16)}
    wanted |= {f"swinv2_{size}_window{n}_22k_finetune" for size in ("base", "large") for n in (16, 24)}
    wanted |= {f"biformer_{size}_imagenet" for size in ("tiny", "small", "stl", "stl_nchw")}
    wanted |= {f"maxvit_{size}_imagenet" for size in ("tiny", "small", "base", "large")}
    wanted |= {f"{name}_imagenet" for name in ("halo_h1", "hwt_tiny", "hwt_tiny_256", "hnt_mini", "hnt_tiny")}
    finetuned = {f"{name}_finetune" for name in ("dinat_large_384", "swin_base_384", "maxvit_tiny_384")}
    assert wanted | finetuned == set(EXPERIMENTS)


def test_published_rates_come_out_at_the_published_batch() -> None:
    from nearfield.engine.optim import lr_scale

    nat = door.compose("train", TrainConfig, ["experiment=nat_tiny_imagenet"])
    assert nat.optim.lr * lr_scale(nat.optim, 1024) == pytest.approx(1e-3)
    assert nat.optim.decay_bias_tables
    swin = door.compose("train", TrainConfig, ["experiment=swin_tiny_imagenet"])
    assert swin.optim.lr * lr_scale(swin.optim, 1024) == pytest.approx(1e-3)
    assert swin.sched.min_lr * lr_scale(swin.optim, 1024) == pytest.approx(1e-5)
    assert not swin.optim.decay_bias_tables
    for name, batch in (("biformer_small", 2048), ("biformer_stl", 1024)):
        biformer = door.compose("train", TrainConfig, [f"experiment={name}_imagenet"])
        scale = lr_scale(biformer.optim, batch)
        rates = (biformer.optim.lr, biformer.sched.min_lr, biformer.sched.warmup_lr)
        assert [rate * scale for rate in rates] == pytest.approx([5e-4 * batch / 512, 1e-5, 1e-6])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_task_brings_its_demo_unless_an_experiment_says_what_is_trained(task: str) -> None:
    demo = door.compose("train", TrainConfig, [f"task={task}"])
    assert (demo.task.name, demo.data.name, demo.model.name) == (task, "scenes", "nat_nano_128")
    recipe = {"detection": "nat_tiny_mask_rcnn_coco", "segmentation": "nat_tiny_upernet_ade20k"}[task]
    config = door.compose("train", TrainConfig, [f"task={task}", f"experiment={recipe}"])
    assert (config.task.name, config.model.name) == (task, "nat_tiny")
    assert config.data.name == recipe.rsplit("_", 1)[1]


@pytest.mark.parametrize(("task", "data"), [("detection", "coco"), ("segmentation", "masks")])
@pytest.mark.parametrize("spelling", ["data={}", "data.name={}", "++data.name={}"])
def test_a_task_on_named_data_has_nothing_of_the_demo(task: str, data: str, spelling: str) -> None:
    config = door.compose("train", TrainConfig, [f"task={task}", spelling.format(data)])
    plain = check.build(TaskConfig, yaml.safe_load((door.CONFIGS / f"task/{task}.yaml").read_text()))
    assert config.task == plain
    assert (config.data.name, config.optim.name, config.optim.lr) == (data, "adamw", 1e-4)
    assert config.model.name == ""
    assert config.aug.policy == {"detection": "multi_scale", "segmentation": "random_crop"}[task]
    other = door.compose(
        "train", TrainConfig, ["optim=sgd", f"data={data}", f"task={task}", "aug=none", "model=nat_tiny"]
    )
    assert (other.optim.name, other.aug.no_aug, other.model.name, other.task) == ("sgd", True, "nat_tiny", plain)
    assert other.optim.lr == door.compose("train", TrainConfig, ["optim=sgd"]).optim.lr
    assert door.compose("train", TrainConfig, [f"task={task}", "data=scenes"]).task.kwargs["channels"] == 64


@pytest.mark.parametrize("spelling", ["model=nat_nano", "model.name=nat_nano", "model=default"])
def test_named_data_ask_for_a_model(spelling: str) -> None:
    """Those of the demos are made for images of 32 and 128 pixels."""
    for task in (["task=detection", "data=coco"], ["task=segmentation", "data.name=cityscapes"]):
        with pytest.raises(ConfigError, match=r"model\.name is not set: .* model=\w+_tiny model\.pretrained=true"):
            fit.train(door.compose("train", TrainConfig, task))
        assert door.compose("train", TrainConfig, [*task, spelling]).model.name == "nat_nano"


@pytest.mark.parametrize("data", ["ade20k", "voc", "masks", "cityscapes"])
@pytest.mark.parametrize("spelling", ["data={}", "data.name={}"])
def test_a_segmentor_is_evaluated_at_the_scale_that_it_is_trained_at(data: str, spelling: str) -> None:
    config = door.compose("train", TrainConfig, ["task=segmentation", spelling.format(data)])
    assert config.task.fit == config.aug.kwargs["scale"] == ([2048, 1024] if data == "cityscapes" else [2048, 512])
    assert config.aug.kwargs["crop"] == ([512, 1024] if data == "cityscapes" else 512)
    assert segmentation_policy(config.aug.policy, config.aug.kwargs, mean=[0.0], std=[1.0])
    drawn = door.compose("train", TrainConfig, ["task=segmentation", "data=scenes"])
    assert (drawn.task.fit, "scale" in drawn.aug.kwargs) == (None, False)


def test_whole_files_are_evaluated_as_the_published_ones_are() -> None:
    config = door.compose("eval", EvalConfig, ["task=segmentation", "data=ade20k", "model=nat_tiny", "checkpoint=x"])
    assert config.task.fit == list(ADE20K_SCALE)  # as scripts/predict.py does


def test_a_sweep_of_data_starts_from_one_thing() -> None:
    sweep = door.expand(TrainConfig, ["-m", "task=segmentation", "data=voc,masks", "model=nat_tiny"])[1]
    assert "+finetune=segmentation" in sweep
    with pytest.raises(ConfigError, match=r"^data=voc,cityscapes: what training starts from differs among them"):
        door.expand(TrainConfig, ["-m", "task=segmentation", "data=voc,cityscapes"])


def test_tasks_are_no_sweep() -> None:
    with pytest.raises(ConfigError, match="run them one by one"):
        door.expand(TrainConfig, ["-m", "task=detection,segmentation"])


def test_a_debug_group_lies_on_top_of_an_experiment() -> None:
    for order in (["debug=fdr", "+experiment=nat_tiny_imagenet"], ["experiment=nat_tiny_imagenet", "debug=fdr"]):
        config = door.compose("train", TrainConfig, order)
        assert (config.model.name, config.data.name, config.trainer.epochs) == ("nat_tiny", "synthetic", 1)


DEBUG = {"fdr": (1, None), "limit": (2, None), "overfit": (60, 10), "profiler": (1, None)}  # epochs, eval_every


@pytest.mark.parametrize("debug", DEBUG)
@pytest.mark.parametrize("task", ["task=segmentation", "task=detection", "task=segmentation data=voc", "seed=0"])
def test_a_debug_group_lies_on_top_of_what_a_task_brings(task: str, debug: str) -> None:
    epochs, eval_every = DEBUG[debug]
    plain = door.compose("train", TrainConfig, task.split())
    for order in ([*task.split(), f"debug={debug}"], [f"+debug={debug}", *task.split()]):
        config = door.compose("train", TrainConfig, order)
        assert config.trainer.epochs == epochs
        assert config.trainer.eval_every == (eval_every or plain.trainer.eval_every)
        assert config.data.name == ("synthetic" if debug == "fdr" else plain.data.name)
    assert door.compose("train", TrainConfig, [*task.split(), "debug=null"]) == plain
    assert door.compose("train", TrainConfig, [*task.split(), f"debug={debug}", "trainer.epochs=3"]).trainer.epochs == 3


def test_the_command_line_lies_on_top_of_everything() -> None:
    config = door.compose(
        "train", TrainConfig, ["+experiment=nat_tiny_imagenet", "debug=fdr", "trainer.epochs=3", "model=nat_mini"]
    )
    assert (config.trainer.epochs, config.model.name) == (3, "nat_mini")


@pytest.mark.parametrize("name", ["nat_nano", "swin_tiny.ms_in1k", "resnet18"])
def test_model_takes_any_name(name: str) -> None:
    assert door.compose("train", TrainConfig, [f"model={name}"]).model.name == name


def test_every_key_can_be_set_even_those_no_file_mentions() -> None:
    for key in check.known_keys(TrainConfig):
        assert check.locate(TrainConfig, key) is None
    config = door.compose(
        "train", TrainConfig, ["trainer.clip_mode=agc", "optim.betas=[0.9,0.95]", "model.kwargs.mlp_ratio=3"]
    )
    assert config.trainer.clip_mode == "agc"
    assert config.optim.betas == [0.9, 0.95]
    assert config.model.kwargs == {"mlp_ratio": 3}


WRONG = {
    "trainer.epochss=3": ["trainer.epochss", "no such key", "'epochs'", "allowed there"],
    "epochs=3": ["top level", "'trainer.epochs'"],
    "+foo.bar=1": ["foo.bar", "no such key"],
    "trainer.epochs=many": ["trainer.epochs", "'many'", "whole number"],
    "trainer.epochs=2.5": ["trainer.epochs", "2.5", "whole number"],
    "trainer.ema=1": ["trainer.ema", "true or false"],
    "optim.lr=-1": ["optim.lr", "at least 0"],
    "optim.betas=0.9": ["optim.betas", "a list"],
    "optim.betas=[0.9,x]": ["optim.betas[1]", "a number"],
    "sched.name=cosin": ["sched.name", "'cosine'", "allowed"],
    "logger.names=[csv]": ["logger.names", "tensorboard, wandb"],
    "model.name=null": ["model.name", "null is not allowed"],
    "data.num_classes=0": ["data.num_classes", "at least 1"],
    "trainer=3": ["trainer=3", "no such option", "default, imagenet"],
    "data=imagnet": ["data=imagnet", "'imagenet'"],
    "experiment=nat_tinny": ["experiment=nat_tinny", "'nat_tiny_imagenet'"],
    "model": ["'model'", "KEY=VALUE"],
    "trainer.epochs=[1": ["trainer.epochs"],
    "paths.runs=${paths.nope}": ["paths.nope"],
    "data.mean={a: 1}": ["data.mean"],
    "model.kwargs=3": ["model.kwargs", "group of keys"],
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_one_line_that_names_it(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        door.compose("train", TrainConfig, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in WRONG[override]:
        assert part in message


def test_a_key_that_a_file_gets_wrong_is_found_too() -> None:
    with pytest.raises(ConfigError, match=r"data\.batchsize: no such key in data \(did you mean 'batch_size'\?\)"):
        check.build(TrainConfig, {"data": {"batchsize": 3}})
    with pytest.raises(ConfigError, match="not a group of keys"):
        check.build(TrainConfig, {"data": 3})


def test_defaults_of_the_dataclasses_pass_their_own_check() -> None:
    for kind in (TrainConfig, EvalConfig):
        assert check.build(kind, dataclasses.asdict(kind())) == kind()


def test_names_of_optimizers_and_models_in_the_files_exist() -> None:
    from timm.optim import list_optimizers

    for option in options("optim"):
        assert door.compose("train", TrainConfig, [f"optim={option}"]).optim.name in list_optimizers()
    assert timm.is_model("nat_nano")
