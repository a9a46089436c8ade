"""DiNAT: Dilated Neighborhood Attention Transformer (Hassani and Shi, arXiv 2209.15001).

NAT with every second block dilated so far that its window spans the map at the training resolution. The dilations are
no parameters: a NAT file and a DiNAT file of one size cannot be told apart by their content.
"""

from __future__ import annotations

from .nat import NAT
from .registry import register

_MINI = {"depths": (3, 4, 6, 5), "dilations": ((1, 8, 1), (1, 4) * 2, (1, 2) * 3, (1,) * 5)}
_224 = {"depths": (3, 4, 18, 5), "dilations": ((1, 8, 1), (1, 4) * 2, (1, 2) * 9, (1,) * 5)}
_384 = {"depths": (3, 4, 18, 5), "dilations": ((1, 13, 1), (1, 6) * 2, (1, 3) * 9, (1,) * 5)}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "drop_path_rate": 0.35}

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
)
