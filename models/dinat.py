"""DiNAT: Dilated Neighborhood Attention Transformer (Hassani and Shi, arXiv 2209.15001).

NAT with every second block dilated so far that its window spans the map at the training resolution. The dilations are
no parameters: a NAT file and a DiNAT file of one size cannot be told apart by their content. Detectors and segmentors
have larger dilations (``task=``).
"""

from __future__ import annotations

from typing import Any

from .nat import NAT
from .registry import register

_MINI = {"depths": (3, 4, 6, 5), "dilations": ((1, 8, 1), (1, 4) * 2, (1, 2) * 3, (1,) * 5)}
_224 = {"depths": (3, 4, 18, 5), "dilations": ((1, 8, 1), (1, 4) * 2, (1, 2) * 9, (1,) * 5)}
_384 = {"depths": (3, 4, 18, 5), "dilations": ((1, 13, 1), (1, 6) * 2, (1, 3) * 9, (1,) * 5)}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "drop_path_rate": 0.35}

# detection/configs/dinat and segmentation/configs/dinat of SHI-Labs/Neighborhood-Attention-Transformer: images of up to
# 800 x 1333, crops of 512 x 512, and (large) of 640 x 640
_COCO = {"dilations": ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7) * 3, (1, 3, 1, 3, 1))}
_COCO_MINI = {"dilations": ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1))}
_512 = {"dilations": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2, 1, 2, 1))}
_512_MINI = {"dilations": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1))}
_640 = {"dilations": ((1, 20, 1), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5) * 2 + (1, 5), (1, 2, 1, 2, 1))}

_BY_TASK: dict[str, dict[str, Any]] = {"detection": _COCO, "segmentation": _512}
_BY_TASK_LARGE: dict[str, dict[str, Any]] = {"detection": _COCO, "segmentation": _640}

register(
    __name__,
    NAT,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "dinat_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 1),
            "dilations": ((1, 4), (1, 2), (1,)),
            "num_heads": (1, 2, 4),
            "kernel_size": 3,
            "mlp_ratio": 2.0,
        },
        "dinat_mini": {**_MINI, "embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2},
        "dinat_tiny": {**_224, "embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2},
        # unlike nat_small, published without layer scale
        "dinat_small": {**_224, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3},
        "dinat_base": {
            **_224,
            "embed_dim": 128,
            "num_heads": (4, 8, 16, 32),
            "mlp_ratio": 2.0,
            "layer_scale": 1e-5,
            "drop_path_rate": 0.5,
        },
        "dinat_large": {**_224, **_LARGE},
        "dinat_large_384": {**_384, **_LARGE, "img_size": 384},
        "dinat_large_384_11x11": {**_224, **_LARGE, "img_size": 384, "kernel_size": 11},
    },
    tasks={
        "dinat_mini": {"detection": _COCO_MINI, "segmentation": _512_MINI},
        "dinat_tiny": _BY_TASK,
        "dinat_small": _BY_TASK,
        "dinat_base": _BY_TASK,
        "dinat_large": _BY_TASK_LARGE,
        "dinat_large_384": _BY_TASK_LARGE,
    },
)
