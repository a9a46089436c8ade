"""The recipes for COCO and ADE20K: what their files say, the models and the optimizers that come of it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from nearfield.checkpoints import find
from nearfield.engine import door, fit, network, optim
from nearfield.engine.config import TrainConfig
from nearfield.engine.dense.crops import segmentation_policy
from nearfield.engine.dense.transforms import detection_policy
from torch import nn

EXPERIMENTS = door.CONFIGS / "experiment"
CLASSES = {"coco": 80, "ade20k": 150}
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)

# millions of parameters, as the authors print them (BiFormer's do not)
MASK, CASCADE, UPERNET = "mask_rcnn_coco", "cascade_mask_rcnn_coco", "upernet_ade20k"
PUBLISHED = {
    **{f"{family}_mini_{MASK}": 40 for family in ("nat", "dinat")},
    **{f"{family}_tiny_{MASK}": 48 for family in ("nat", "dinat", "dinat_s", "swin")},
    **{f"{family}_small_{MASK}": 70 for family in ("nat", "dinat")},
    **{f"{family}_small_{MASK}": 69 for family in ("dinat_s", "swin")},
    "swin_tiny_mask_rcnn_1x_coco": 48,
    **{f"{family}_mini_{CASCADE}": 77 for family in ("nat", "dinat")},
    **{f"{family}_tiny_{CASCADE}": 85 for family in ("nat", "dinat")},
    **{f"{family}_small_{CASCADE}": 108 for family in ("nat", "dinat")},
    **{f"{family}_base_{CASCADE}": 147 for family in ("nat", "dinat")},
    f"dinat_large_{CASCADE}": 258,
    **{f"{family}_tiny_{CASCADE}": 86 for family in ("dinat_s", "swin")},
    **{f"{family}_small_{CASCADE}": 107 for family in ("dinat_s", "swin")},
    **{f"{family}_base_{CASCADE}": 145 for family in ("dinat_s", "swin")},
    f"dinat_s_large_{CASCADE}": 253,
    **{f"{family}_mini_{UPERNET}": 50 for family in ("nat", "dinat")},
    **{f"{family}_tiny_{UPERNET}": 58 for family in ("nat", "dinat")},
    **{f"{family}_small_{UPERNET}": 82 for family in ("nat", "dinat")},
    **{f"{family}_base_{UPERNET}": 123 for family in ("nat", "dinat")},
    f"dinat_large_{UPERNET}": 238,
    **{f"{family}_tiny_{UPERNET}": 60 for family in ("dinat_s", "swin")},
    **{f"{family}_small_{UPERNET}": 81 for family in ("dinat_s", "swin")},
    **{f"{family}_base_{UPERNET}": 121 for family in ("dinat_s", "swin")},
    f"dinat_s_large_{UPERNET}": 234,
}
UNPRINTED = {
    f"biformer_{size}_{rest}" for size in ("small", "base") for rest in (MASK, "retinanet_coco", UPERNET, "fpn_ade20k")
}
RECIPES = sorted(path.stem for end in CLASSES for path in EXPERIMENTS.glob(f"*_{end}.yaml"))
# one of each family and kind of head
QUICK = (
    f"nat_mini_{CASCADE}",
    f"dinat_mini_{MASK}",
    f"dinat_s_tiny_{UPERNET}",
    f"swin_tiny_{MASK}",
    "biformer_small_retinanet_coco",
    "biformer_small_fpn_ade20k",
)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@cache
def composed(name: str) -> TrainConfig:
    return door.compose("train", TrainConfig, [f"experiment={name}"])


@cache
def built(name: str) -> Any:
    """The model of a recipe without its weights, on the meta device."""
    config = door.compose(
        "train", TrainConfig, [f"experiment={name}", "model.pretrained=false", "model.checkpoint=null"]
    )
    build = network.build_detector if config.task.name == "detection" else network.build_segmentor
    with torch.device("meta"):
        return build(config.model, config.task, str(config.task.head), num_classes=CLASSES[name.rsplit("_", 1)[1]])


def comment(name: str) -> str:
    """The words that open a recipe, in one line."""
    lines = (EXPERIMENTS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[1:] if line.startswith("# "))


def test_the_recipes_are_those_that_were_promised() -> None:
    assert set(RECIPES) == set(PUBLISHED) | UNPRINTED


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_its_figure_and_its_source(name: str) -> None:
    words = comment(name)
    assert re.search(r"Source: github\.com/\S+ at [0-9a-f]{7}, \S+\.py and its bases; figures of \S+\.md\.", words)
    if name.endswith("_coco"):
        kind = "1x schedule (12 epochs)" if composed(name).trainer.epochs == 12 else "3x schedule (36 epochs)"
        assert re.search(r" on COCO, .*published box AP \d\d\.\d(, mask AP \d\d\.\d)?\. Source", words)
        assert ("mask AP" in words) == ("mask" in str(composed(name).task.head))
    else:
        kind = f"{(composed(name).trainer.updates or 0) // 1000}k updates"
        assert re.search(
            r" on ADE20K, .*published mIoU \d\d\.\d\d?(, \d\d\.\d\d? with 6 scales and mirrored)?\. S", words
        )
    assert kind in words
    assert "not decayed" in words
    assert "Global batch" in words


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_authors_share(name: str) -> None:
    config = composed(name)
    family, size = re.fullmatch(r"([a-z]+(?:_s)?)_(mini|tiny|small|base|large)_.*", name).groups()  # type: ignore[union-attr]
    assert config.model.name == f"{family}_{size}"
    assert config.model.drop_path_rate is not None
    assert 0 < config.model.drop_path_rate <= 0.6
    # the rates are meant for the batch that the recipe has
    batch = config.data.batch_size * config.trainer.accumulate
    assert batch == config.optim.lr_base_size == (32 if "_fpn_" in name else 16)
    assert (config.optim.name, config.optim.betas, config.optim.layer_decay) == ("adamw", [0.9, 0.999], None)
    assert not config.optim.decay_bias_tables
    assert config.trainer.clip_grad is None
    assert not config.trainer.ema
    assert str(config.task.head) in name
    assert name.endswith(f"_{config.data.name}")
    assert config.hardware.amp == (
        "none" if name.startswith("dinat_large") or re.match("swin_.*_ade20k", name) else "auto"
    )
    if config.task.name == "detection":
        assert (config.task.min_size, config.task.max_size) == (800, 1333)
        assert not config.data.keep_empty
        once = family == "biformer" or "_1x_" in name
        assert (config.trainer.epochs, config.sched.decay_milestones) == ((12, [8, 11]) if once else (36, [27, 33]))
        assert detection_policy(config.aug.policy, config.aug.kwargs)
        assert config.aug.policy == ("multi_scale" if family == "biformer" else "multi_scale_crop")
    else:
        crop = 640 if size == "large" else 512
        assert (config.task.fit, config.task.crop) == ([4 * crop, crop], None)
        assert config.aug.kwargs["crop"] == crop
        assert config.aug.kwargs["scale"] == [4 * crop, crop]
        assert segmentation_policy(config.aug.policy, config.aug.kwargs, mean=[0.0] * 3, std=[1.0] * 3)
        assert config.trainer.updates == (80_000 if config.task.head == "fpn" else 160_000)


def test_the_table_of_the_docs_has_every_recipe_with_its_figures() -> None:
    text = (door.CONFIGS.parent / "docs/recipes.md").read_text()
    rows = {row[0].strip("`"): row[1:] for row in re.findall(r"^\| (`\w+`) \|(.*)\|$", text, re.MULTILINE)}
    assert set(rows) == set(RECIPES)
    for name, (cells,) in rows.items():
        figures = re.findall(r"\d\d\.\d\d?", comment(name).split(". Source")[0])
        assert re.findall(r"\d\d\.\d\d?", cells) == figures
        assert cells.strip().endswith("not measured")


def tag(text: str) -> str:
    """What the weights that the index has under a name were trained on."""
    entry = find(text)
    assert entry is not None, text
    return entry.tag


@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_that_a_recipe_starts_from_are_in_the_index(name: str) -> None:
    model = composed(name).model
    if "_large_" in name:
        assert not model.pretrained
        assert tag(str(model.checkpoint)) == "in22k"
    else:
        assert model.pretrained
        assert model.checkpoint is None
        assert tag(model.name) in ("in1k", "ms_in1k")
    assert ("reported dead" in comment(name)) == name.startswith("biformer")


@pytest.mark.parametrize("name", ALL)
def test_the_model_has_the_published_size(name: str) -> None:
    millions = sum(p.numel() for p in built(name).parameters()) / 1e6
    if name in PUBLISHED:
        assert abs(millions - PUBLISHED[name]) < 0.6
    else:
        # a pyramid and heads on the published backbone
        assert millions > {"small": 25.5, "base": 56.8}[name.split("_")[1]]


@pytest.mark.parametrize("name", ALL)
def test_weight_decay_spares_norms_biases_and_tables_and_nothing_else(name: str) -> None:
    config, model = composed(name), built(name)
    optimizer = optim.create_optimizer(config.optim, model, global_batch=int(config.optim.lr_base_size or 0))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert spared | decayed == set(names.values())
    assert not spared & decayed
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, config.optim.weight_decay}
    assert {group["lr"] for group in optimizer.param_groups} == {config.optim.lr}
    tables = {key for key in names.values() if key.endswith("rel_pos_bias")}
    assert bool(tables) == ("biformer" not in name)
    norms = {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, NORMS)
        for key, _ in module.named_parameters()
    }
    biases = {key for key in names.values() if key.endswith(".bias")}
    assert tables | norms | biases <= spared
    # what is left are layer scales
    assert all("gamma" in key or "ls" in key or "layer_scale" in key for key in spared - tables - norms - biases)


def attentions(name: str) -> list[list[Any]]:
    body = built(name).backbone.body
    return [[block.attn for block in stage.blocks] for stage in getattr(body, "model", body).stages]


DILATIONS = {
    f"dinat_mini_{MASK}": [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
    f"dinat_s_tiny_{UPERNET}": [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
    f"dinat_mini_{UPERNET}": [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]],
    f"dinat_s_tiny_{CASCADE}": [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
    f"dinat_s_large_{UPERNET}": [[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2]],
    f"nat_mini_{CASCADE}": [[1] * 3, [1] * 4, [1] * 6, [1] * 5],
}


@pytest.mark.parametrize("name", DILATIONS)
def test_dilations_are_those_of_the_task(name: str) -> None:
    assert [[attn.dilation[0] for attn in stage] for stage in attentions(name)] == DILATIONS[name]
    assert all(attn.dilation[0] == attn.dilation[1] for stage in attentions(name) for attn in stage)


@pytest.mark.parametrize(("name", "regions"), [("biformer_small_retinanet_coco", 16), ("biformer_small_fpn_ade20k", 8)])
def test_regions_are_those_of_the_task_and_statistics_are_kept_in_detectors(name: str, regions: int) -> None:
    assert {attn.regions for stage in attentions(name)[:3] for attn in stage} == {(regions, regions)}
    backbone = built(name).train().backbone
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {norm.training for norm in norms} == {regions == 8}


@pytest.mark.parametrize("name", QUICK)
def test_every_map_has_a_norm_of_its_own(name: str) -> None:
    assert len(built(name).backbone.norms) == (3 if "retinanet" in name else 4)
    assert all(isinstance(norm, nn.LayerNorm) for norm in built(name).backbone.norms)


def test_cascades_are_trained_as_published() -> None:
    heads = built(f"nat_mini_{CASCADE}").model.roi_heads
    assert heads.box_loss == "giou"
    assert [stage.proposal_matcher.high_threshold for stage in heads.stages] == [0.5, 0.6, 0.7]
    for stage in heads.stages:
        assert sum(isinstance(module, nn.Conv2d) for module in stage.box_head.modules()) == 4
        assert sum(isinstance(module, nn.BatchNorm2d) for module in stage.box_head.modules()) == 4
        assert sum(isinstance(module, nn.Linear) for module in stage.box_head.modules()) == 1
        assert stage.box_predictor.bbox_pred.out_features == 4 * 81  # one box for each class


def rates(name: str, updates: list[int], *, per_epoch: int) -> list[float]:
    """The learning rate of each of these updates."""
    config = composed(name)
    batch = int(config.optim.lr_base_size or 0)
    optimizer = optim.create_optimizer(config.optim, nn.Linear(2, 2), global_batch=batch)
    scheduler, _ = optim.create_scheduler(
        config.sched, config.optim, config.trainer, optimizer, updates_per_epoch=per_epoch, global_batch=batch
    )
    out = []
    for update in updates:
        scheduler.step_update(update)
        out.append(optimizer.param_groups[0]["lr"])
    return out


def test_the_rate_of_a_detector_rises_in_500_updates_and_falls_at_the_milestones() -> None:
    per_epoch = 7330  # 117,266 images with objects
    updates = [0, 250, 500, 27 * per_epoch - 2, 27 * per_epoch, 33 * per_epoch - 2, 33 * per_epoch, 36 * per_epoch - 1]
    expected = [1e-7, 5.005e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
    assert rates(f"nat_tiny_{MASK}", updates, per_epoch=per_epoch) == pytest.approx(expected)


def test_the_rate_of_a_segmentor_rises_in_1500_updates_and_falls_in_a_straight_line() -> None:
    updates = [0, 750, 1500, 80_000, 160_000]
    expected = [6e-11, 3e-5, 6e-5 * (1 - 1500 / 160_000), 3e-5, 0]
    assert rates(f"nat_tiny_{UPERNET}", updates, per_epoch=1263) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    cosine = rates("biformer_small_fpn_ade20k", [0, 500, 40_000, 80_000], per_epoch=632)
    assert cosine == pytest.approx([2e-5, 1.1e-4, 1e-4, 2e-12], rel=1e-4)


# few proposals: what an untrained detector finds is noise, and much of it
SHORT = ["data.batch_size=2", "data.limit_train_batches=1", "data.eval_batch_size=1", "data.limit_val_batches=1"]
FEW = ["proposals=50", "samples=32", "detections=5"]
RUNS = {
    "dinat_s_tiny_mask_rcnn_coco": "mask_ap",
    f"nat_mini_{CASCADE}": "mask_ap",
    "biformer_small_retinanet_coco": "box_ap",
    f"swin_tiny_{UPERNET}": "miou",
    "biformer_small_fpn_ade20k": "miou",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_runs_from_end_to_end(name: str, tmp_path: Path) -> None:
    overrides = [f"experiment={name}", "debug=fdr", "hardware=cpu", *SHORT, "trainer.plots=false", "task.pictures=0"]
    few = ["task.fit=null"] if name.endswith("ade20k") else [f"+task.kwargs.{key}" for key in FEW]
    summary = fit.train(door.compose("train", TrainConfig, [*overrides, *few, f"paths.runs={tmp_path}"]))
    assert 0 <= summary[RUNS[name]] <= 1
