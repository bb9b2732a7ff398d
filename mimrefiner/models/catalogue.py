"""The catalogue of models: what can be named, where it comes from, and how loading was verified."""

from dataclasses import dataclass
from itertools import groupby
from textwrap import wrap

RANDOM = "reference implementation with random weights"
LAYOUT = "layout only"
OFFICIAL = "golden tensors of MIM-Refiner's implementation, random weights"
TIMM_CODE = "timm's own model code"
PACKAGED = "the file itself, which comes with this package"
UNKNOWN = "see source page"


@dataclass(frozen=True)
class CatalogueRow:
    """One model.

    Attributes:
        name: what :func:`mimrefiner.load_encoder` takes: a timm name, the name of a file in
            ``assets/``, or a name that only this catalogue gives to a published file.
        family: the method that trained it.
        dim, depth, heads, patch, image_size: sizes of a plain ViT (the last two in pixels); 0 where
            timm knows better.
        licence: what its authors allow.
        page: where it is described.
        url: the published file; "" where timm or the package has it.
        cls: position of the cls token, None without one.
        sha256: hash of the published file, "" where it is not known.
        paper: what the paper uses it for; "" where it is here for comparison.
        verified: what its loading was compared with, one of the constants above.
    """

    name: str
    family: str
    dim: int
    depth: int
    heads: int
    patch: int
    image_size: int
    licence: str
    page: str
    url: str = ""
    cls: int | None = 0
    sha256: str = ""
    paper: str = ""
    verified: str = LAYOUT


SIZES = {  # width, blocks, attention heads, side of a patch, side of an image
    "b8": (768, 12, 12, 8, 224),
    "b16": (768, 12, 12, 16, 224),
    "l16": (1024, 24, 16, 16, 224),
    "h14": (1280, 32, 16, 14, 224),
    "h16_448": (1280, 32, 16, 16, 448),
    "h16": (1280, 32, 16, 16, 224),
    "2b14": (2560, 24, 32, 14, 224),
    "6.5b14": (4096, 32, 32, 14, 224),
}

# Licences
NC = "CC BY-NC 4.0"
RESEARCH = "non-commercial (ImageNet's terms)"
# Where models are described, and where their files lie
GITHUB = "https://github.com/"
FAIRSEQ = GITHUB + "facebookresearch/fairseq"
TIMM = "https://huggingface.co/timm"
JKU = "https://ml.jku.at/research/mimrefiner/download/"
MAECT = "https://ml.jku.at/research/maect/download/"
FAIR = "https://dl.fbaipublicfiles.com/"
BYTES = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/"
LONGLIAN = "https://huggingface.co/longlian/CrossMAE/resolve/main/vitl-mr0.75-kmr0.75-dd12/"
ZHOUPANS = "https://huggingface.co/zhoupans/Mugs/resolve/main/pretrained%20models/"
# What the paper uses them for
TABLES = "low-shot, probe, k-NN; clustering"
BLOCKS = "k-NN per block"
COMPARED = "larger models the abstract compares with"


def _released(
    family: str, licence: str, page: str, verified: str, paper: str, base: str, rows: dict
) -> tuple[CatalogueRow, ...]:
    """Rows of published files; ``rows``: name -> (size, address of the file below ``base``)."""
    cls = None if family == "I-JEPA" else 0
    return tuple(
        CatalogueRow(
            name, family, *SIZES[size], licence, page, base + file, cls, "", paper, verified
        )
        for name, (size, file) in rows.items()
    )


def _timm(
    name: str,
    family: str,
    licence: str,
    size: str = "",
    cls: int | None = 0,
    paper: str = "",
    verified: str = TIMM_CODE,
) -> CatalogueRow:
    sizes = SIZES.get(size, (0,) * 5)
    return CatalogueRow(
        name, family, *sizes, licence, TIMM, cls=cls, paper=paper, verified=verified
    )


def _packaged(name: str, family: str, licence: str, sizes: tuple, sha256: str) -> CatalogueRow:
    page = "mimrefiner/assets/README.md"
    return CatalogueRow(name, family, *sizes, licence, page, sha256=sha256, verified=PACKAGED)


CATALOGUE = (
    *_released(
        "MIM-Refiner",
        UNKNOWN,
        GITHUB + "ml-jku/MIM-Refiner",
        OFFICIAL,
        f"{TABLES}; transfer; fine-tuning",
        JKU,
        {
            "mae_refined_l16": ("l16", "maerefined_l16.th"),
            "mae_refined_h14": ("h14", "maerefined_h14.th"),
            "mae_refined_2b14": ("2b14", "maerefined_twob14.th"),
            "d2v2_refined_l16": ("l16", "d2v2refined_l16.th"),
            "d2v2_refined_h14": ("h14", "d2v2refined_h14.th"),
            "dbot_refined_l16": ("l16", "dbotrefined_l16.th"),
            "dbot_refined_h14": ("h14", "dbotrefined_h14.th"),
            "crossmae_refined_l16": ("l16", "crossmaerefined_l16.th"),
        },
    ),
    *_released(
        "MAE",
        NC,
        GITHUB + "facebookresearch/mae",
        RANDOM,
        f"{BLOCKS}; {TABLES}",
        FAIR + "mae/pretrain/",
        {
            "mae_b16": ("b16", "mae_pretrain_vit_base.pth"),
            "mae_l16": ("l16", "mae_pretrain_vit_large.pth"),
            "mae_h14": ("h14", "mae_pretrain_vit_huge.pth"),
        },
    ),
    *_released(
        "MAE",
        NC,
        GITHUB + "facebookresearch/maws",
        RANDOM,
        f"{BLOCKS}; {TABLES}",
        FAIR + "maws/pretrain/mae_in1k/",
        {
            "mae_2b14": ("2b14", "vit_2b14.pt"),
        },
    ),
    *_released(
        "data2vec 2.0",
        "MIT",
        FAIRSEQ,
        OFFICIAL,
        f"{BLOCKS}; {TABLES}",
        FAIR + "fairseq/data2vec2/",
        {
            "d2v2_b16": ("b16", "base_imagenet.pt"),
            "d2v2_l16": ("l16", "large_imagenet.pt"),
            "d2v2_h14": ("h14", "huge_imagenet.pt"),
        },
    ),
    *_released(
        "dBOT",
        UNKNOWN,
        GITHUB + "liuxingbin/dbot",
        RANDOM,
        "fine-tuning; spider",
        BYTES + "mmodal/dbot/",
        {
            "dbot_l16": ("l16", "86.6_dbot_large_pre.pth"),
            "dbot_h14": ("h14", "87.4_dbot_huge_pre.pth"),
        },
    ),
    *_released(
        "CrossMAE",
        UNKNOWN,
        GITHUB + "TonyLianLong/CrossMAE",
        LAYOUT,
        "",
        LONGLIAN,
        {
            "crossmae_l16": (
                "l16",
                "imagenet-mae-cross-vitl-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
            ),
        },
    ),
    *_released(
        "I-JEPA",
        NC,
        GITHUB + "facebookresearch/ijepa",
        RANDOM,
        BLOCKS,
        FAIR + "ijepa/",
        {
            "ijepa_h14": ("h14", "IN1K-vit.h.14-300e.pth.tar"),
            "ijepa_h16_448": ("h16_448", "IN1K-vit.h.16-448px-300e.pth.tar"),
        },
    ),
    *_released(
        "iBOT",
        "Apache 2.0",
        GITHUB + "bytedance/ibot",
        LAYOUT,
        TABLES,
        BYTES + "archive/2022/ibot/",
        {
            "ibot_b16": ("b16", "vitb_16_rand_mask/checkpoint_teacher.pth"),
            "ibot_l16": ("l16", "vitl_16_rand_mask/checkpoint.pth"),
        },
    ),
    *_released(
        "Mugs",
        "Apache 2.0",
        GITHUB + "sail-sg/mugs",
        LAYOUT,
        TABLES,
        ZHOUPANS,
        {
            "mugs_l16": ("l16", "vit_large_backbone_250ep.pth"),
        },
    ),
    *_released(
        "DINO",
        "Apache 2.0",
        GITHUB + "facebookresearch/dino",
        RANDOM,
        "",
        FAIR + "dino/",
        {
            "dino_b8": ("b8", "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
        },
    ),
    *_released(
        "MAE-CT",
        UNKNOWN,
        GITHUB + "ml-jku/MAE-CT",
        LAYOUT,
        f"{BLOCKS}; {TABLES}",
        MAECT,
        {
            "maect_h14": ("h14", "maect_huge14.th"),
            "maect_h16": ("h16", "maect_huge16.th"),
            "maectaug_l16": ("l16", "maectaug_large16.th"),
            "maectaug_h14": ("h14", "maectaug_huge14.th"),
        },
    ),
    *_released(
        "MAWS",
        NC,
        GITHUB + "facebookresearch/maws",
        RANDOM,
        COMPARED,
        FAIR + "maws/pretrain/maws/",
        {
            "maws_2b14": ("2b14", "vit_2b14.pt"),
            "maws_6.5b14": ("6.5b14", "vit_6.5b14.pt"),
        },
    ),
    _timm("vit_base_patch16_224.mae", "MAE", NC, "b16", paper=BLOCKS),
    _timm("vit_large_patch16_224.mae", "MAE", NC, "l16", paper=f"{BLOCKS}; {TABLES}"),
    _timm("vit_huge_patch14_224.mae", "MAE", NC, "h14", paper=f"{BLOCKS}; {TABLES}"),
    _timm("vit_base_patch8_224.dino", "DINO", "Apache 2.0", "b8"),
    _timm("vit_huge_patch14_gap_224.in1k_ijepa", "I-JEPA", NC, "h14", None, BLOCKS),
    _timm("vit_huge_patch16_gap_448.in1k_ijepa", "I-JEPA", NC, "h16_448", None, BLOCKS),
    _timm(
        "vit_giant_patch14_dinov2.lvd142m",
        "DINOv2",
        "Apache 2.0",
        paper=f"clustering; {COMPARED}",
        verified=RANDOM,
    ),
    _timm("vit_gigantic_patch14_clip_224.laion2b", "OpenCLIP", "MIT", paper=COMPARED),
    _timm("eva02_large_patch14_224.mim_m38m", "EVA-02", UNKNOWN),
    _timm("beit3_large_patch16_224.pt", "BEiT-3", UNKNOWN),
    _timm("aimv2_large_patch14_224.apple_pt", "AIMv2", UNKNOWN, cls=None),
    _timm("vit_large_patch16_siglip_256.webli", "SigLIP", UNKNOWN, cls=None),
    _timm("vit_large_patch16_dinov3.lvd1689m", "DINOv3", UNKNOWN),
    _timm("hiera_large_224.mae", "Hiera", UNKNOWN, cls=None),
    _timm("convnextv2_large.fcmae", "ConvNeXtV2", UNKNOWN, cls=None),
    _packaged(
        "simmim_digits",
        "this package, SimMIM",
        "MIT",
        (64, 12, 4, 8, 32),
        "b57f7ac877f6070308cb8aa4f59af5b6152acd5c03c7f2a0d2d53d1773027ffb",
    ),
    _packaged(
        "mae_tiny_64",
        "this package, MAE",
        RESEARCH,
        (192, 12, 3, 8, 64),
        "2c09ff10a40727193f2071cf4a07f13935a9cb1d55cc67b6322346fc39b4f3c5",
    ),
    _packaged(
        "mae_tiny_64_refined",
        "this package, MAE",
        RESEARCH,
        (192, 12, 3, 8, 64),
        "1c80141b73063e29fb86ff944d78f993529847e625c89d730b252fddc0ff04da",
    ),
)


BY_NAME = {row.name: row for row in CATALOGUE}


def table(width: int = 100) -> str:
    """The catalogue as text of at most ``width`` columns.

    Models that agree in licence and verification stand together.
    """
    size = max(len(row.name) for row in CATALOGUE)
    form = f"  {{:{size}}} {{:>5}} {{:>6}} {{:>5}} {{:>5}} {{:>5}} {{:>5}} {{}}"
    head = form.format("name", "dim", "blocks", "heads", "patch", "px", "cls", "sha256")
    lines = [
        "px: image size; cls: position of the cls token; timm: sizes are timm's; "
        "sha256: of the file"
    ]
    groups = groupby(CATALOGUE, lambda r: (r.family, r.licence, r.page, r.verified, r.paper))
    for (family, licence, page, verified, paper), rows in groups:
        lines += ["", f"{family}: licence {licence}, {page}"]
        for text in (f"verified against: {verified}", f"in the paper: {paper or 'not in it'}"):
            lines += wrap(text, width, initial_indent="  ", subsequent_indent="    ")
        lines.append(head)
        for row in rows:
            sizes = (row.dim, row.depth, row.heads, row.patch, row.image_size)
            cls, sha256 = "none" if row.cls is None else row.cls, row.sha256[:8] or "unknown"
            lines.append(form.format(row.name, *(n or "timm" for n in sizes), cls, sha256))
    return "\n".join(lines)
