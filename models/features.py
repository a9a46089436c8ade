"""Multi-scale features of a backbone: what ``features_only=True`` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from timm.models._features import FeatureGetterNet
from torch import Tensor

from .backbone import Backbone, take_stages
from .loading import OUTPUT_NORM, LoadsPublished, fit_state_dict, tell_norms_left_out

_MODEL = "model."


class Features(FeatureGetterNet, LoadsPublished):
    """Wraps a backbone; its forward returns the list of feature maps of some stages, NCHW unless asked otherwise.

    Args:
        model: the backbone; pruned in place.
        out_indices: an int for the last n stages, a sequence for these (negative from the end), None for all; the maps
            come in the order of the stages.
        **options: timm's ``norm`` (norm the last stage's map), ``output_fmt`` (``NCHW`` or ``NHWC``), ``prune``.

    Loading takes the keys of a whole classifier (published or ours, with or without the ``model.`` prefix) and leaves
    out what features do not need: the head, the final norm unless it is applied, the stages that were pruned. The norms
    that a published detector or segmentor puts on its maps are left out too, which one log line says.
    """

    def __init__(self, model: Backbone, out_indices: int | Sequence[int] | None = None, **options: Any) -> None:
        stages = take_stages(out_indices, len(model.stages), "out_indices")
        super().__init__(model, out_indices=tuple(stages), **options)

    @property
    def backbone(self) -> Backbone:
        """The wrapped (pruned) backbone."""
        return cast(Backbone, self.model)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """As ``Backbone.no_weight_decay``, under this module's names."""
        return {_MODEL + name for name in self.backbone.no_weight_decay()}

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As ``Backbone.set_input_size``."""
        self.backbone.set_input_size(*args, **kwargs)

    def fit_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given state dict with this module's keys; parts that features do not need are left out."""
        bare = {key.removeprefix(_MODEL): value for key, value in state.items()}
        norms = [key for key in bare if OUTPUT_NORM.fullmatch(key)]
        tell_norms_left_out(norms)
        bare = {key: value for key, value in bare.items() if key not in norms}
        fitted = fit_state_dict(bare, self.backbone)
        unused = self.backbone.pruned_prefixes()
        return {_MODEL + key: value for key, value in fitted.items() if not key.startswith(unused)}
