"""The configuration as typed dataclasses: every key that exists, its type, its default and what it means.

`configs/` holds the values, this file the meaning, and `check.py` compares the two. Numbers are seconds, epochs, pixels
or fractions as the comment says; `None` (null in yaml) means "decided for you", and the comment says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _choice(default: Any, *allowed: Any) -> Any:
    """A field that takes only the `allowed` values (and None where its type says so)."""
    return field(default=default, metadata={"choices": allowed})


def _number(default: Any, *, low: float | None = None, high: float | None = None) -> Any:
    """A numeric field with `low <= value <= high`; where it holds a list, each entry is."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class ModelConfig:
    """What is trained or evaluated."""

    name: str = ""  # any name of nearfield.list_models() or timm.list_models()
    pretrained: bool = False  # start from the published weights
    checkpoint: str | None = None  # start from this file: path, URL, name in the index; any published layout
    new_head: bool = False  # draw a new classifier when that file's has another number of classes than the data
    num_classes: int | None = _number(None, low=1)  # null: counted in the data
    in_chans: int | None = _number(None, low=1)  # null: the data's channels
    img_size: int | list[int] | None = field(default=None, metadata={"low": 8})  # pixels, or [height, width]; null: own
    drop_rate: float | None = _number(None, low=0, high=1)  # dropout before the classifier; null: the model's own
    drop_path_rate: float | None = _number(None, low=0, high=1)  # stochastic depth; null: the model's own
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third more time
    kwargs: dict[str, Any] = field(default_factory=dict)  # any other argument of the model's constructor


@dataclass
class DataConfig:
    """Which images, how many at once, and how they are prepared for evaluation."""

    name: str = (
        "digits"  # digits, synthetic, folder, or a name of timm.data.create_dataset: wds/..., hfds/..., torch/...;
        # detection: scenes, coco; segmentation: scenes, ade20k, cityscapes, voc, masks
    )
    root: str | None = None  # folder with train/ and val/ (or validation/), or with train.tar and val.tar
    train_split: str = "train"
    val_split: str = "validation"  # timm's synonyms are understood: val, validation, valid, test
    num_classes: int | None = _number(None, low=1)  # null: counted; streams that cannot be counted need it
    num_images: int = _number(256, low=2)  # size of the synthetic set; scenes to train on (a quarter as many held out)
    scene_size: int = _number(128, low=64)  # pixels a side
    train_samples: int | None = _number(None, low=1)  # length of a stream that does not know it
    val_samples: int | None = _number(None, low=1)
    held_out: float = _number(0.2, low=0.01, high=0.9)  # fraction of the digits that is never trained on
    split_seed: int = 0  # of that split; independent of the training seed
    class_map: str = ""  # file with one class name per line (timm)
    train_images: str | None = None  # coco: folder of images below root; null: found by its usual names
    val_images: str | None = None
    train_annotations: str | None = None  # coco: annotation file below root; null: found by its usual names
    val_annotations: str | None = None
    keep_empty: bool = True  # coco: train on images without an object too
    class_names: list[str] | None = None  # masks: classes in the order of their labels; null: classes.txt, or the set's
    label_map: dict[str, int] | None = None  # masks: stored number, or "red,green,blue", to class; 255 is ignored
    mask_suffix: str = ""  # masks: _mask if the mask of cat.jpg is cat_mask.png
    skip_missing: bool = False  # coco and masks: leave images out whose file or mask is missing instead of refusing
    download: bool = False  # let torchvision or Hugging Face fetch the set
    batch_size: int = _number(64, low=1)  # images per step
    eval_batch_size: int | None = _number(None, low=1)  # null: batch_size
    workers: int = _number(0, low=0)  # loader processes
    crop_pct: float | None = _number(None, low=0.01, high=1)  # evaluation transform; null: the model's own
    crop_mode: str | None = _choice(None, "center", "squash", "border")
    interpolation: str | None = _choice(None, "bilinear", "bicubic", "nearest", "lanczos", "random")
    mean: list[float] | None = None  # per channel, images in [0, 1]; null: the model's own
    std: list[float] | None = None
    limit_train_batches: int | None = _number(None, low=1)  # at most so many batches per epoch
    limit_val_batches: int | None = _number(None, low=1)
    overfit_batches: int | None = _number(
        None, low=1
    )  # train, and evaluate in training, on so many batches, not augmented


@dataclass
class OptimConfig:
    """The optimizer, by timm's names (timm.optim.list_optimizers)."""

    name: str = "adamw"
    lr: float = _number(1e-3, low=0)
    lr_base_size: int | None = _number(None, low=1)  # lr, warmup_lr and min_lr are meant for this global batch: scaled
    weight_decay: float = _number(0.05, low=0)  # not on biases, 1-D parameters and model.no_weight_decay()
    decay_bias_tables: bool = False  # true: relative position bias tables are decayed all the same
    momentum: float = _number(0.9, low=0, high=1)
    betas: list[float] | None = field(default=None, metadata={"low": 0, "high": 1})  # null: the optimizer's own
    eps: float | None = _number(None, low=0)
    layer_decay: float | None = _number(None, low=0, high=1)  # lr of each layer is this times that of the layer above
    kwargs: dict[str, Any] = field(default_factory=dict)  # any other argument of the optimizer


@dataclass
class SchedConfig:
    """The learning rate over time, by timm's names; it moves at every update."""

    name: str = _choice("cosine", "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
    warmup_epochs: float = _number(0, low=0)
    warmup_updates: int | None = _number(None, low=0)  # the same in updates
    warmup_lr: float = _number(1e-6, low=0)
    warmup_prefix: bool = False  # true: the curve starts after the warm-up; false: it runs under it
    min_lr: float = _number(0.0, low=0)
    cooldown_epochs: int = _number(0, low=0)  # epochs at min_lr after trainer.epochs
    decay_epochs: float | None = _number(None, low=0)  # step, wsd, rsqrt
    decay_rate: float = _number(0.1, low=0)  # step, multistep; the power of poly
    decay_milestones: list[int] = field(
        default_factory=lambda: [90, 180, 270], metadata={"low": 1}
    )  # epochs; multistep


@dataclass
class AugConfig:
    """Augmentation of the training images, by timm's names."""

    no_aug: bool = False  # none of what follows, whatever it says
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0], metadata={"low": 0})  # random resized crop: area
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333], metadata={"low": 0})  # and aspect ratio
    hflip: float = _number(0.5, low=0, high=1)
    vflip: float = _number(0.0, low=0, high=1)
    color_jitter: float = _number(0.0, low=0)
    auto_augment: str | None = None  # e.g. rand-m9-mstd0.5-inc1
    interpolation: str = _choice("random", "random", "bilinear", "bicubic")
    re_prob: float = _number(0.0, low=0, high=1)  # random erasing
    re_mode: str = _choice("pixel", "pixel", "rand", "const")
    re_count: int = _number(1, low=1)
    repeats: int = _number(0, low=0)  # repeated augmentation: so many versions of each image; 0 is none
    mixup: float = _number(0.0, low=0)  # alpha; 0 is none
    cutmix: float = _number(0.0, low=0)
    mixup_prob: float = _number(1.0, low=0, high=1)
    mixup_switch_prob: float = _number(0.5, low=0, high=1)
    mixup_mode: str = _choice("batch", "batch", "pair", "elem")
    mixup_off_epochs: int = _number(0, low=0)  # the last so many epochs are not mixed
    rotate: float = _number(0.0, low=0, high=180)  # degrees; this and the next two act on sets kept in memory (digits)
    translate: float = _number(0.0, low=0, high=1)  # fraction of the side
    zoom: float = _number(0.0, low=0, high=0.9)  # fraction
    # detection: none, multi_scale, multi_scale_crop, jitter; segmentation: none, random_crop, light
    policy: str = "none"
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the policy: engine/dense/{transforms,crops}.py


@dataclass
class TaskConfig:
    """What is learned."""

    name: str = _choice("classification", "classification", "detection", "segmentation")
    # classification
    loss: str = _choice("cross_entropy", "cross_entropy", "bce")
    smoothing: float = _number(0.1, low=0, high=0.99)  # label smoothing
    # detection and segmentation
    head: str | None = None  # nearfield.create_detector's or create_segmentor's; null: mask_rcnn or upernet
    out_norm: str = _choice("auto", "auto", "layer", "none")  # of each map of the backbone; auto: as its authors did
    kwargs: dict[str, Any] = field(default_factory=dict)  # any other argument of create_detector or create_segmentor
    min_size: int = _number(800, low=16)  # detection: shorter side when evaluated, pixels
    max_size: int = _number(1333, low=16)  # detection: and the longest that this may make
    threshold: float = _number(0.5, low=0, high=1)  # detection: score from which pictures show an object
    pictures: int = _number(6, low=0)  # images that are drawn at the end, next to the truth
    aux_weight: float = _number(0.4, low=0)  # segmentation: of the auxiliary head's loss
    # segmentation, evaluated: fitted into (longest, shortest) side, null is their own size
    fit: list[int] | None = field(default=None, metadata={"low": 16})
    ratios: list[float] = field(default_factory=lambda: [1.0], metadata={"low": 0.05})  # times these, averaged
    flip: bool = False  # and mirrored as well
    crop: int | None = _number(None, low=16)  # sliding window, pixels; null: whole images
    stride: int | None = _number(None, low=1)


@dataclass
class TrainerConfig:
    """The loop."""

    epochs: int = _number(30, low=1)
    updates: int | None = _number(None, low=1)  # train for so many updates, whatever epochs says
    accumulate: int = _number(1, low=1)  # batches per update
    clip_grad: float | None = _number(None, low=0)
    clip_mode: str = _choice("norm", "norm", "value", "agc")
    ema: bool = False  # evaluate and write a moving average of the weights
    ema_decay: float = _number(0.9998, low=0, high=1)
    ema_warmup: bool = False  # let the decay grow from 0 (timm's ModelEmaV3)
    eval_every: int = _number(1, low=1)  # epochs; the last epoch is always evaluated
    max_nonfinite: int = _number(20, low=1)  # updates in a row without a finite loss and gradient before giving up
    log_seconds: float = _number(30.0, low=0)  # time between plain progress lines inside an epoch
    plots: bool = True  # write curves.png
    profile: bool = False  # trace a few steps with torch.profiler into the run folder


@dataclass
class WandbConfig:
    """Weights & Biases; only read when `wandb` is among logger.names."""

    project: str = "nearfield"
    entity: str | None = None
    name: str | None = None  # null: the run folder's name
    tags: list[str] = field(default_factory=list)
    mode: str = _choice("offline", "offline", "online")
    timeout: float = _number(20.0, low=1)  # seconds to wait for the server before going on offline


@dataclass
class LoggerConfig:
    """Where the numbers go besides metrics.csv, which is always written."""

    names: list[str] = field(default_factory=list, metadata={"choices": ("tensorboard", "wandb")})
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class PathsConfig:
    """Where things are written; relative paths count from the folder of the command."""

    runs: str = "runs"
    results: str = "runs/results.csv"


@dataclass
class HardwareConfig:
    """The device and its arithmetic."""

    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps
    amp: str = _choice("auto", "auto", "none", "bf16", "fp16")  # auto: bf16 on cuda, none elsewhere
    threads: int | None = _number(None, low=1)  # cpu threads; null: torch's choice
    deterministic: bool = False  # only deterministic algorithms
    matmul_precision: str = _choice("highest", "highest", "high", "medium")  # float32 products; high allows TF32


@dataclass
class TrainConfig:
    """`train.py`."""

    seed: int = _number(0, low=0)
    compile: bool = False  # torch.compile the model (of a detector or segmentor the backbone) for training
    traceback: bool = False  # show where an error comes from
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    aug: AugConfig = field(default_factory=AugConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class EvalConfig:
    """`eval.py`."""

    run: str | None = None  # a run folder: its model, its data, its weights
    checkpoint: str | None = None  # a file (path, URL, name in the index) or a run folder
    weights: str = _choice("last", "last", "best")  # which weights of a run folder
    split: str = _choice("val", "val", "train")
    seed: int = _number(0, low=0)
    compile: bool = False  # torch.compile the model, of a detector or segmentor the backbone
    traceback: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
