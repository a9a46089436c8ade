"""Semantic segmentation: a backbone, a decoder on its maps, and an auxiliary head for training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .backbone import DenseBackbone
from .convs import resize
from .fcn import FCN
from .loading import LoadsPublishedDense, load_dense, read_dense
from .published import SEGMENTOR_BODY, SEMANTIC_FPN, UPERNET
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

HEADS = ("upernet", "fpn")


class Segmentor(LoadsPublishedDense):
    """A backbone and its decoder; takes images of any size that the backbone takes (32 x 32 and more).

    ``load_state_dict`` takes this package's own keys and those of mmseg's ``EncoderDecoder`` (see ``published``).

    Args:
        backbone: gives the maps, finest first.
        head: takes the maps, gives logits at the size of the finest.
        aux_head: takes the last map but one (stage 3 of 4), gives logits of its size; None for no auxiliary loss. It is
            used in training alone.

    Attributes:
        num_classes: maps of logits.
        pretrained_cfg: timm's, of the backbone (mean, std, interpolation).
    """

    layouts = (UPERNET, SEMANTIC_FPN)
    body = SEGMENTOR_BODY
    optional = {"aux_head": re.compile(r"aux_head\.")}
    classifiers = re.compile(r"(aux_)?head\.classifier\.conv\.(weight|bias)")

    def __init__(self, backbone: DenseBackbone, head: UPerNet | SemanticFPN, aux_head: FCN | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.aux_head = aux_head
        self.num_classes = head.classifier.conv.out_channels
        self.pretrained_cfg: dict[str, Any] = backbone.pretrained_cfg

    def forward(self, x: Tensor) -> Any:
        """Images (B, in_chans, H, W) to logits (B, num_classes, H, W).

        In training a dict: ``out``, these logits, and ``aux``, those of the auxiliary head where there is one.
        """
        maps = self.backbone(x)
        logits = resize(self.head(maps), x.shape[2:])
        if not self.training:
            return logits
        if self.aux_head is None:
            return {"out": logits}
        return {"out": logits, "aux": resize(self.aux_head(maps[-2]), x.shape[2:])}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of the backbone in the backward pass instead of storing its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides norms and biases."""
        return {SEGMENTOR_BODY + name for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's layer groups for layer decay: those of the backbone, and one last group of all heads.

        Args:
            coarse: groups are stages instead of blocks.

        Returns:
            a function from the name of a parameter to its group.
        """
        groups = self.backbone.group_matcher(coarse)
        return lambda name: (
            groups(name.removeprefix(SEGMENTOR_BODY)) if name.startswith(SEGMENTOR_BODY) else (float("inf"),)
        )


def create_segmentor(
    backbone_name: str,
    head: str = "upernet",
    *,
    num_classes: int,
    channels: int | None = None,
    aux: bool | None = None,
    aux_channels: int = 256,
    fpn_channels: int = 256,
    dropout: float = 0.1,
    norm: str = "batch",
    checkpoint_path: str | Path | None = None,
    pretrained: bool = False,
    **backbone_options: Any,
) -> Segmentor:
    """Make a segmentor by the name of its backbone.

    Args:
        backbone_name: a model of this package or of timm.
        head: ``upernet`` (pyramid pooling 1, 2, 3, 6 and a top-down pathway) or ``fpn`` (semantic FPN).
        num_classes: maps of logits; ignored pixels are no class.
        channels: width of the decoder; None for the published 512 (UPerNet) or 128 (semantic FPN).
        aux: an FCN head on the last map but one, whose logits training returns too; None: with UPerNet, as published.
        aux_channels: its width.
        fpn_channels: width of the semantic FPN's pyramid.
        dropout: of whole channels, before each classifier.
        norm: ``batch``, or ``group`` for the decoders' norms.
        checkpoint_path: a path, URL or index name. A classifier's file gives the backbone; a segmentor's file, of this
            package or of mmseg, everything (the classifiers are drawn anew for another number of classes); a detector's
            the backbone with its output norms. One log line says what was left out.
        pretrained: load the published classifier into the backbone.
        **backbone_options: of ``DenseBackbone`` (``out_norm``, ``in_chans``, ``out_indices``, ...) and of the model
            (``drop_path_rate``, ``dilations``, ...).

    Raises:
        ValueError: unknown name or option, a number out of range.
        CheckpointError: the file cannot be had or does not fit.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown: use {' or '.join(HEADS)}")
    sizes = {"num_classes": num_classes, "channels": channels}
    for name, value in {**sizes, "aux_channels": aux_channels, "fpn_channels": fpn_channels}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    backbone_options.setdefault("task", "segmentation")
    state = read_dense(checkpoint_path)
    backbone = DenseBackbone(
        backbone_name,
        pretrained=pretrained and not checkpoint_path,
        checkpoint_path=checkpoint_path if state is None else None,
        **backbone_options,
    )
    widths, strides = backbone.channels, backbone.strides
    decoder: UPerNet | SemanticFPN
    if head == "upernet":
        decoder = UPerNet(widths, num_classes, channels or 512, dropout, norm=norm)
    else:
        decoder = SemanticFPN(widths, strides, num_classes, channels or 128, fpn_channels, norm, dropout)
    aux = head == "upernet" if aux is None else aux
    if aux and len(widths) < 2:
        raise ValueError(f"aux=True needs two maps, {backbone_name} gives one here: set aux=False or more out_indices")
    model = Segmentor(
        backbone, decoder, FCN(widths[-2], num_classes, aux_channels, dropout=dropout, norm=norm) if aux else None
    )
    if state is not None:
        load_dense(model, state)
    return model
