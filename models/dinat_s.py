"""DiNAT_s: dilated neighborhood attention in Swin's body (Hassani and Shi, arXiv 2209.15001, section 3.4).

Patches of 4 x 4 and patch merging as in Swin; window attention and its shift are replaced by neighborhood attention,
dilated in every second block.
"""

from __future__ import annotations

from typing import Any

from ..checkpoints import Layout, Rule
from .layers import PatchMerging, PatchStem
from .nat import NAT
from .registry import register


class DiNATS(NAT):
    """DiNAT_s; arguments as of ``NAT``."""

    stem_type = PatchStem
    downsample_type = PatchMerging
    first_conv = "stem.proj"
    layouts = (
        Layout(
            name="shi-labs",
            source="SHI-Labs/Neighborhood-Attention-Transformer, classification/dinats.py",
            signature=("patch_embed.proj.weight", "layers.0.blocks.0.attn.rpb"),
            rules=(
                Rule("patch_embed.{rest}", "stem.{rest}"),
                Rule("layers.{i}.downsample.{rest}", "stages.{i+1}.downsample.{rest}"),
                Rule("layers.{i}.blocks.{j}.attn.rpb", "stages.{i}.blocks.{j}.attn.rel_pos_bias"),
                Rule("layers.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
        ),
    )


_TINY = {"depths": (2, 2, 6, 2), "dilations": ((1, 8), (1, 4), (1, 2) * 3, (1, 1))}
_224 = {"depths": (2, 2, 18, 2), "dilations": ((1, 8), (1, 4), (1, 2) * 9, (1, 1))}
_384 = {"depths": (2, 2, 18, 2), "dilations": ((1, 13), (1, 6), (1, 3) * 9, (1, 1))}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 4.0, "drop_path_rate": 0.35}

# detection/configs/dinat_s and segmentation/configs/dinat_s of SHI-Labs/Neighborhood-Attention-Transformer: images of
# up to 800 x 1333, crops of 512 x 512, and (large) of 640 x 640
_COCO = {"dilations": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7) * 3, (1, 3))}
_COCO_TINY = {"dilations": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))}
_512 = {"dilations": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2))}
_512_TINY = {"dilations": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))}
_640 = {"dilations": ((1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5) * 2 + (1, 5), (1, 2))}

_BY_TASK: dict[str, dict[str, Any]] = {"detection": _COCO, "segmentation": _512}
_BY_TASK_LARGE: dict[str, dict[str, Any]] = {"detection": _COCO, "segmentation": _640}

register(
    __name__,
    DiNATS,
    {
        "dinat_s_tiny": {
            **_TINY,
            "embed_dim": 96,
            "num_heads": (3, 6, 12, 24),
            "mlp_ratio": 4.0,
            "drop_path_rate": 0.2,
        },
        "dinat_s_small": {
            **_224,
            "embed_dim": 96,
            "num_heads": (3, 6, 12, 24),
            "mlp_ratio": 4.0,
            "drop_path_rate": 0.3,
        },
        "dinat_s_base": {
            **_224,
            "embed_dim": 128,
            "num_heads": (4, 8, 16, 32),
            "mlp_ratio": 4.0,
            "drop_path_rate": 0.5,
        },
        "dinat_s_large": {**_224, **_LARGE},
        "dinat_s_large_384": {**_384, **_LARGE, "img_size": 384},
    },
    tasks={
        "dinat_s_tiny": {"detection": _COCO_TINY, "segmentation": _512_TINY},
        "dinat_s_small": _BY_TASK,
        "dinat_s_base": _BY_TASK,
        "dinat_s_large": _BY_TASK_LARGE,
        "dinat_s_large_384": _BY_TASK_LARGE,
    },
)
