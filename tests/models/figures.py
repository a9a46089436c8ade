"""What was printed of every model: millions of parameters, thousand millions of multiply-adds, and what these count.

Our counter is PyTorch's ``FlopCounterMode`` with the formulas of our operators: products of matrices, of queries with
the keys that they see. Authors count the same, to within 1 % or the digits that they print. timm's tables are counted
by fvcore (see its ``benchmark.py``), which counts norms too, and whatever else timm's code computes by products: those
rows name it in ``also``. Each name is a quantity that ``model_helpers.multiply_adds`` computes from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHI_LABS = "SHI-Labs/Neighborhood-Attention-Transformer, classification/{NAT,DiNAT}.md at d334f5b"
MICROSOFT = "microsoft/Swin-Transformer, MODELHUB.md at f82860b; parameters as timm prints them"
RAYLEIZHU = "rayleizhu/BiFormer, README.md at 1697bbb"
HILBERT = "Yunge6666/Hilbert-Local-Attention, README.md at a1d8b7f"
HALONET = "arXiv 2103.12731, table of the models H0 to H7"
TIMM = "huggingface/pytorch-image-models, results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv at aa4b585"


@dataclass(frozen=True)
class Printed:
    """One model's row.

    Attributes:
        millions: parameters as printed; None if nobody printed them.
        gmacs: multiply-adds at the model's own input size as printed, in thousand millions; None likewise.
        source: where.
        also: what the printed multiply-adds count besides the products of our counter.
        classes: of the model that was counted.
        cut: whether further digits of ``millions`` were cut off, not rounded.
        missing: why there is no figure, where one is None.
    """

    millions: str | None
    gmacs: str | None
    source: str
    also: tuple[str, ...] = ()
    classes: int = 1000
    cut: bool = False
    missing: str = ""


def _rows(source: str, figures: Mapping[str, tuple[str, str]], *also: str, classes: int = 1000) -> dict[str, Printed]:
    return {name: Printed(*printed, source, also, classes) for name, printed in figures.items()}


_OTHERS = "the 200 that are printed are those of the 7x7 kernel: 200.94, to which the larger tables add 0.20"
_UNCOUNTED = "the README prints no parameters; the bodies are Swin's and NAT's, see test_hilbert.py"
_OURS = "the authors printed nothing of this size; it is Swin's or NAT's body with their attention"
_PAPER = "the paper prints no multiply-adds of it"

PRINTED: dict[str, Printed] = {
    # their table has whole millions: 20, 28, 51 and 90; the digits after the point are those of our survey
    **_rows(
        SHI_LABS,
        {
            "nat_mini": ("19.98", "2.7"),
            "nat_tiny": ("27.90", "4.3"),
            "nat_small": ("50.74", "7.8"),
            "nat_base": ("89.77", "13.7"),
            "dinat_mini": ("20", "2.7"),
            "dinat_tiny": ("28", "4.3"),
            "dinat_small": ("51", "7.8"),
            "dinat_base": ("90", "13.7"),
            "dinat_s_tiny": ("28", "4.5"),
            "dinat_s_small": ("50", "8.7"),
            "dinat_s_base": ("88", "15.4"),
            "dinat_s_large": ("197", "34.5"),
            "dinat_s_large_384": ("197", "101.5"),
        },
    ),
    "dinat_large": Printed("200", "30.6", SHI_LABS, cut=True),
    "dinat_large_384": Printed("200", "89.7", SHI_LABS, cut=True),
    "dinat_large_384_11x11": Printed(None, "92.4", SHI_LABS, missing=_OTHERS),
    **_rows(
        MICROSOFT,
        {
            "swin_tiny": ("28.29", "4.5"),
            "swin_small": ("49.61", "8.7"),
            "swin_base": ("87.77", "15.4"),
            "swin_base_384": ("87.90", "47.1"),
            "swin_large": ("196.53", "34.5"),
            "swin_large_384": ("196.74", "103.9"),
            "swinv2_tiny_window8": ("28.35", "5.9"),
            "swinv2_tiny_window16": ("28.35", "6.6"),
            "swinv2_small_window8": ("49.73", "11.5"),
            "swinv2_small_window16": ("49.73", "12.6"),
            "swinv2_base_window8": ("87.92", "20.3"),
            "swinv2_base_window16": ("87.92", "21.8"),
            "swinv2_base_window16_22k": ("87.92", "21.8"),
            "swinv2_base_window24_22k": ("87.92", "54.7"),
            "swinv2_large_window16_22k": ("196.74", "47.5"),
            "swinv2_large_window24_22k": ("196.74", "115.4"),
        },
    ),
    # the authors print nothing of what they only pre-trained; timm does, with the classes of ImageNet-22k
    "swinv2_base_window12_22k": Printed("109.28", "11.90", TIMM, classes=21841),
    "swinv2_large_window12_22k": Printed("228.77", "26.17", TIMM, classes=21841),
    **_rows(
        RAYLEIZHU,
        {
            "biformer_tiny": ("13.1", "2.2"),
            "biformer_small": ("25.5", "4.5"),
            "biformer_base": ("56.8", "9.8"),
            "biformer_stl": ("28.4", "4.6"),
            "biformer_stl_nchw": ("28.4", "4.6"),
        },
    ),
    "hwt_tiny": Printed(None, "4.5", HILBERT, missing=_UNCOUNTED),
    "hwt_tiny_256": Printed(None, "5.9", HILBERT, missing=_UNCOUNTED),
    "hnt_mini": Printed(None, "2.7", HILBERT, missing=_UNCOUNTED),
    "hnt_tiny": Printed(None, "4.3", HILBERT, missing=_UNCOUNTED),
    **{
        name: Printed(None, None, HILBERT, missing=_OURS)
        for name in ("hwt_small", "hwt_small_256", "hwt_base", "hwt_base_256", "hnt_small", "hnt_base")
    },
    "halo_h0": Printed("5.5", None, HALONET, missing=_PAPER),
    # timm registers it as halonet_h1
    "halo_h1": Printed("8.1", "3.00", f"{HALONET}; multiply-adds: {TIMM}", ("norms", "whole tables")),
    "halo_h2": Printed("9.4", None, HALONET, missing=_PAPER),
    "halo_h3": Printed("12.3", None, HALONET, missing=_PAPER),
    "halo_h4": Printed("19.1", None, HALONET, missing=_PAPER),
    "halo_h5": Printed("30.7", None, HALONET, missing=_PAPER),
    "halo_h6": Printed("43.4", None, HALONET, missing=_PAPER),
    "halo_h7": Printed("67.4", None, HALONET, missing=_PAPER),
    **_rows(
        TIMM,
        {
            "halonet_26t": ("12.48", "3.19"),
            "sehalonet_33ts": ("13.69", "3.55"),
            "halonet_50ts": ("22.73", "5.30"),
            "eca_halonext_26ts": ("10.76", "2.44"),
            "halo_regnetz_b": ("11.68", "1.97"),
        },
        "norms",
        "whole tables",
    ),
    **_rows(
        TIMM,
        {
            "maxvit_tiny": ("30.92", "5.60"),
            "maxvit_tiny_384": ("30.98", "17.53"),
            "maxvit_tiny_512": ("31.05", "33.49"),
            "maxvit_small": ("68.93", "11.66"),
            "maxvit_small_384": ("69.02", "35.87"),
            "maxvit_small_512": ("69.13", "67.26"),
            "maxvit_base": ("119.47", "24.04"),
            "maxvit_base_384": ("119.65", "73.80"),
            "maxvit_base_512": ("119.88", "138.02"),
            "maxvit_large": ("211.79", "43.68"),
            "maxvit_large_384": ("212.03", "132.55"),
            "maxvit_large_512": ("212.33", "244.75"),
            "maxvit_xlarge_384": ("475.32", "292.78"),
            "maxvit_xlarge_512": ("475.77", "534.14"),
        },
        "norms",
        "look-ups",
    ),
    **_rows(TIMM, {"maxvit_xlarge": ("506.99", "97.52")}, "norms", "look-ups", classes=21843),
    **_rows(
        TIMM,
        {
            "maxvit_nano_rw": ("15.45", "4.46"),
            "maxvit_tiny_rw": ("29.06", "5.11"),
            "maxvit_rmlp_pico_rw": ("7.52", "1.85"),
            "maxvit_rmlp_nano_rw": ("15.50", "4.47"),
            "maxvit_rmlp_tiny_rw": ("29.15", "6.77"),
            "maxvit_rmlp_small_rw": ("64.90", "10.75"),
            "maxvit_rmlp_base_rw": ("116.14", "23.15"),
            "maxvit_rmlp_base_384_rw": ("116.14", "70.97"),
        },
        "norms",
    ),
}
