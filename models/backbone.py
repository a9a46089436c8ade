"""The contract of every backbone, written once: timm's model interface on a stem, stages, a norm and a head.

    image (B, in_chans, H, W) -> stem -> stages[0] -> ... -> norm -> head -> logits (B, num_classes)

Maps are channels-last, (B, H, W, C), from the stem to the head. A family builds its stem and its stages and hands them
over; all the rest (features, classifier, layer decay, checkpointing, published weights) is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from timm.layers import ClassifierHead, trunc_normal_
from torch import Tensor, nn

from .arguments import check_entries, check_pool
from .layers import NormLayer, Pair, Size, Stage, to_pair
from .loading import CLASSIFIER, LoadsPublished, fit_state_dict, position_tables
from .published import Published

MIN_IMAGE = 32


class Backbone(LoadsPublished, Published):
    """Hierarchical backbone with timm's interface.

    Args:
        stem: image (B, in_chans, H, W) to map (B, H / stride, W / stride, dims[0]).
        stages: stage i maps dims[i - 1] to dims[i] channels and, from the second on, halves the map.
        dims: channels of each stage.
        stem_stride: reduction of the first stage.
        img_size: nominal image size, an int or (height, width). Any size of at least 32 x 32 is taken at any time; a
            family may derive window sizes from the nominal one.
        in_chans, num_classes: channels of the image; classes, 0 for no classifier.
        global_pool: pooling of timm's ClassifierHead (``avg``, ``max``, ``avgmax``, ``catavgmax``, ``""``).
        drop_rate: dropout before the classifier.
        norm_layer: makes the final norm.
        num_features: channels after the final norm where it changes them, None for dims[-1].
        head: a head of the family's own, in place of the final norm and timm's ClassifierHead.

    The class attributes that the families set are those of ``Published``.
    """

    output_fmt = "NHWC"

    # a ModuleList of Stage, whose items no type checker knows
    stages: Any
    # set by timm's builder
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    _traits: dict[str, Any]
    _model_args: dict[str, Any]

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        *,
        stem_stride: int = 4,
        img_size: Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        num_features: int | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_pool(global_pool)
        self.img_size = to_pair("img_size", img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = num_features or dims[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.feature_info[-1]["num_chs_norm"] = self.num_features
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm_layer(dims[-1]) if head is None else nn.Identity()
        self.head: Any = head or ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights anew: projections from a normal of std 0.02 with zero bias, the rest as their modules do.

        Args:
            needs_reset: call ``reset_parameters`` of every module first; what ``to_empty`` after the meta device needs.
        """

        def initialise(module: nn.Module) -> None:
            reset = getattr(module, "reset_parameters", None)
            if needs_reset and callable(reset):
                reset()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(initialise)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides norms and biases: the position tables."""
        return set(position_tables(self))

    def set_input_size(self, img_size: Size | None = None, **sizes: Any) -> None:
        """Change the nominal image size, and whatever sizes of attention the family has (``window_size``, ...).

        Tables are resized bicubically when their window or kernel changes: they are new parameters, so call this before
        an optimizer is made. No call is needed to run another image size.
        """
        pair = self.img_size if img_size is None else to_pair("img_size", img_size)
        self._resize_attention(pair, **sizes)
        self.img_size = pair
        # what timm writes beside exported weights
        if hasattr(self, "_traits"):
            self._traits = {**self._traits, "img_size": self.img_size}
        if hasattr(self, "_model_args"):
            given = {name: size for name, size in sizes.items() if size is not None}
            self._model_args = {**self._model_args, **given, "img_size": self.img_size}

    def _resize_attention(self, img_size: Pair, **sizes: Any) -> None:
        """The family's part of ``set_input_size``; sizes that are absent or None stay as they are."""
        if sizes:
            resizes = [
                vars(base)["_resize_attention"] for base in type(self).__mro__ if "_resize_attention" in vars(base)
            ]
            known = {p.name for resize in resizes for p in signature(resize).parameters.values()}
            known -= {"self", "sizes", "others"}
            raise ValueError(
                f"{type(self).__name__}.set_input_size takes {', '.join(sorted(known))}, got {', '.join(sizes)}"
            )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, each block (each stage when ``coarse``), the rest.

        A downsampler belongs to its stage's first block, the final norm to the last block.
        """
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of storing them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or Identity when ``num_classes`` is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier (and pooling, if given) in place; 0 classes for none."""
        check_entries(num_classes=num_classes)
        check_pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def check_input(self, x: Tensor) -> None:
        """ValueError unless ``x`` is (B, in_chans, H, W) with H, W >= 32."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"input of shape {tuple(x.shape)} is not (batch, {self.in_chans}, height, width): "
                "give a batch of images, and in_chans= for another number of channels"
            )
        if x.shape[2] < MIN_IMAGE or x.shape[3] < MIN_IMAGE:
            raise ValueError(
                f"image {x.shape[2]}x{x.shape[3]} is smaller than {MIN_IMAGE}x{MIN_IMAGE}: resize or pad it"
            )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the stages asked for.

        Args:
            x: image batch.
            indices: an int for the last n stages, a sequence for these (negative from the end), None for all.
            norm: apply the final norm to the map of the last stage.
            stop_early: run no stage beyond the last one asked for.
            output_fmt: layout of the maps, ``NCHW`` or ``NHWC``.
            intermediates_only: return the list alone.

        Returns:
            (final features as ``forward_features`` gives them, list of maps), or the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be NCHW or NHWC")
        self.check_input(x)
        wanted = take_stages(indices, len(self.stages))
        last = max(wanted)
        stages = self.stages[: last + 1] if stop_early else self.stages
        maps = []
        x = self.first_map(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in wanted:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given stages do not need; returns their (non-negative) indices."""
        wanted = take_stages(indices, len(self.stages))
        last = max(wanted)
        shortened = last < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
            channels = self.feature_info[last]["num_chs"]
            # a classifier for other channels cannot stay
            prune_head = prune_head or channels != self.num_features
            self.num_features = channels
        self.stages = self.stages[: last + 1]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def pruned_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the keys that a whole model has and this one, after pruning, has not."""
        stages = tuple(f"stages.{i}." for i in range(len(self.stages), len(self.feature_info)))
        norm = ("norm.",) if isinstance(self.norm, nn.Identity) else ()
        head = (f"{CLASSIFIER}.",) if isinstance(self.head.fc, nn.Identity) else ()
        return stages + norm + head

    def first_map(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the stem's map (B, H', W', dims[0])."""
        # An image in the layout of the maps, a copy of a few channels: convolutions keep it, so that no map is copied
        # for the norm after them. Not `memory_format=torch.channels_last`, which torch.func.vmap does not know.
        return self.stem(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the normed last map (B, H', W', num_features)."""
        self.check_input(x)
        x = self.first_map(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map (B, H', W', num_features) to logits, or to the pooled features when ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def fit_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given state dict (any layout that the family knows, no prefix) with this model's keys and table sizes."""
        return fit_state_dict(state, self)


def take_stages(indices: int | Sequence[int] | None, stages: int, name: str = "indices") -> list[int]:
    """Stage numbers meant by ``indices``, rising: an int for the last n, a sequence for these, None for all.

    Raises:
        ValueError: a stage that the model does not have, or none at all; says so of the argument ``name``.
    """
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int):
        if not 0 < indices <= stages:
            raise ValueError(f"{name}={indices} asks for the last {indices} of {stages} stages: use 1 to {stages}")
        return list(range(stages - indices, stages))
    if not indices or not all(-stages <= i < stages for i in indices):
        raise ValueError(f"{name}={tuple(indices)} must name stages from {-stages} to {stages - 1}, at least one")
    return sorted({i % stages for i in indices})
