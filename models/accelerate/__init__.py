"""``accelerate``: a timm model keeps its weights and its keys and runs its local attention on ``nearfield.ops``.

One file a family says how; `replacement` says what a replacement is and when a module is left as it is.
"""

from __future__ import annotations

from timm.models import davit as timm_davit
from timm.models import gcvit as timm_gcvit
from timm.models import maxxvit, swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import nn

from . import davit, gcvit, halonet, maxvit, swin
from .replacement import Replacement
from .report import Report

__all__ = ["Report", "accelerate"]

REPLACEMENTS: tuple[type[Replacement], ...] = (
    swin.NearfieldSwinBlock,
    swin.NearfieldSwinV2Block,
    maxvit.NearfieldPartitionAttentionCl,
    maxvit.NearfieldPartitionAttention2d,
    maxvit.NearfieldParallelPartitionAttention,
    davit.NearfieldSpatialBlock,
    gcvit.NearfieldGlobalContextVitBlock,
    halonet.NearfieldHaloAttn,
)
_BY_CLASS = {kind.published: kind for kind in REPLACEMENTS}

_STRANGE_CALLER = "it stands outside timm's own blocks, which may hand it other windows or a mask"
# what people may expect here and would miss in the report
_LEFT: dict[type[nn.Module], str] = {
    timm_davit.ChannelAttention: "channels attend each other: this is no local attention",
    timm_davit.ChannelAttentionV2: "channels attend each other: this is no local attention",
    maxxvit.TransformerBlock2d: "it attends the whole map: this is no local attention",
    swin_transformer_v2_cr.SwinTransformerV2CrBlock: "in training timm drops its position bias pair by pair: no table",
    swin_transformer.WindowAttention: _STRANGE_CALLER,
    swin_transformer_v2.WindowAttention: _STRANGE_CALLER,
    timm_davit.WindowAttention: _STRANGE_CALLER,
    timm_gcvit.WindowAttentionGlobal: _STRANGE_CALLER,
    maxxvit.AttentionCl: _STRANGE_CALLER,
    maxxvit.Attention2d: _STRANGE_CALLER,
}


def accelerate(model: nn.Module) -> Report:
    """Run the local attention of a timm Swin, SwinV2, MaxViT, DaViT, GCViT or HaloNet model on ``nearfield.ops``.

    In place: parameters, state dict keys and outputs (to float32 rounding) stay, no window is cut out of a map any
    more. Works in training and evaluation, with copies, `load_state_dict`, `torch.export` and `set_input_size`; with
    `torch.compile` where that comes later, since what is compiled keeps the code it was compiled from (at `undo` as
    well); not with `torch.jit.script`. Doing it twice is doing it once. Attention dropout has timm's rate and draws
    other masks.

    A module is left as it is, and named with the reason, where its numbers are not known to be the same: a subclass,
    hooks inside its attention, a child that was exchanged, another timm, or a shifted window on a map that is no
    multiple of it (timm rolls before it pads; windows then wrap). A replaced module that later meets such a map or such
    hooks runs timm's code for that call.

    timm subtracts 100 from the scores of a shifted window's other regions, here they are not there: the same in float32
    unless such a score is larger than every other of its query by more than about 80.

    Args:
        model: any module that holds such blocks, bare or inside something else.

    Returns:
        A ``Report``: what was replaced, what was left and why; `print` it. Its ``undo()`` gives timm's code back.

    Raises:
        ValueError: there is nothing to replace.

    Example:
        >>> model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
        >>> report = nearfield.accelerate(model)
    """
    chosen: dict[str, tuple[nn.Module, type[Replacement]]] = {}
    left: dict[str, str] = {}
    decided: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(decided):
            continue
        kind, reason = _decide(module)
        if reason is not None:
            left[name] = reason
        elif kind is not None:
            chosen[name] = module, kind
        else:
            continue
        decided = (*decided, f"{name}." if name else "")
    if not chosen:
        raise ValueError(_nothing(model, left))
    for module, kind in chosen.values():
        module.__class__ = kind  # type: ignore[assignment]
    return Report({name: module for name, (module, _) in chosen.items()}, left)


def _decide(module: nn.Module) -> tuple[type[Replacement] | None, str | None]:
    """The replacement of a module, or why it is left; neither where it is nothing of ours."""
    if isinstance(module, Replacement):
        return type(module), None
    kind = _BY_CLASS.get(type(module))
    if kind is not None:
        reason = kind.refusal(module)
        return (kind, None) if reason is None else (None, reason)
    base = next((published for published in _BY_CLASS if isinstance(module, published)), None)
    if base is not None:
        return None, f"{type(module).__name__} is a subclass of timm's {base.__name__}"
    return None, next((reason for published, reason in _LEFT.items() if isinstance(module, published)), None)


def _nothing(model: nn.Module, left: dict[str, str]) -> str:
    name = type(model).__name__
    if not left:
        families = "Swin, SwinV2, MaxViT, DaViT, GCViT or HaloNet"
        return f"nothing to accelerate in {name}: give a timm {families} model, or one that holds their blocks"
    module, reason = next(iter(left.items()))
    count = f"{len(left)} module{'s' * (len(left) > 1)}"
    return f"nothing to accelerate in {name}: {count} must stay, {module or 'the model itself'} because {reason}"
