# SPDX-License-Identifier: MIT
"""Are the patch features better now? In-context and linear segmentation, as figures and pictures.

    python eval_seg.py --data VOC2012 --dataset voc --weights none runs/neco/teacher.pth
    python eval_seg.py --data coco --dataset coco-things --method linear --weights teacher.pth
    python eval_seg.py --data photos --backbone dinov2_vits14 --pictures 6   # train/, val/ inside
    python eval_seg.py --demo                                # what `python neco.py --demo` left

Two protocols on a frozen backbone, with the settings of the literature as defaults. In-context:
each patch takes the labels of its nearest neighbours among the training patches; nothing is
trained. Linear: one 1x1 convolution from the features to the classes. `--weights` takes several
files, and `none` for the backbone as the hub gives it; the first is what the others are compared
with. Figures are printed and written to results.json under `--out`.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from neco import InputError, load_backbone

# ----------------------------------------------------------------------------------- data sets
# Every data set becomes lists of (image, mask) paths, the class names, and a function that reads a
# mask as class numbers. The layouts are those of the official downloads, nothing is prepared.

IGNORE, INVALID = 255, 254  # marks in a mask: pixel without label, value that no class has
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


class Segmentation(NamedTuple):
    """A data set: pairs of image and mask files, class names, and how to read a mask."""

    train: list[tuple[Path, Path]]
    val: list[tuple[Path, Path]]
    classes: list[str]
    read_mask: Callable[[Path], np.ndarray]  # path -> (H, W) uint8, IGNORE where there is no label


def open_image(path: Path) -> Image.Image:
    """Read and decode an image file; InputError where that fails."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from error


def read_image(path: Path) -> Image.Image:
    """Read an image file of any mode as RGB; 16-bit values are scaled, not cut off."""
    image = open_image(path)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")


def value_table(classes: dict[int, int]) -> np.ndarray:
    """Table (257,) from the values in a mask file to class numbers; the last entry is `other`."""
    table = np.full(257, INVALID, np.uint8)
    table[list(classes)] = list(classes.values())
    return table


def read_values(path: Path) -> np.ndarray:
    """Read a mask file of one number per pixel, grey or palette, as (H, W) integers."""
    image = open_image(path)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise InputError(f"{path} is an image of mode {image.mode}, not one class number per pixel")
    return np.asarray(image).astype(np.int32)


def read_class_mask(path: Path, table: np.ndarray) -> np.ndarray:
    """Read a mask whose values `table` maps to classes; InputError on a value that has none."""
    values = read_values(path)
    mask = table[values.clip(-1, 256)]
    if (mask == INVALID).any():
        raise InputError(f"{path} holds the value {values[mask == INVALID][0]}, which is no class")
    return mask


def read_panoptic_mask(path: Path, segments: dict[Path, tuple]) -> np.ndarray:
    """Read a COCO panoptic PNG, in which a pixel is the segment R + 256 G + 65536 B."""
    ids, classes = segments[path]  # sorted ids, and their classes
    image = open_image(path)
    if image.mode != "RGB":
        raise InputError(f"{path} is an image of mode {image.mode}, not a panoptic RGB mask")
    pixels = np.asarray(image) @ np.array([1, 256, 65536])
    at = np.searchsorted(ids, pixels).clip(max=len(ids) - 1)
    return np.where(ids[at] == pixels, classes[at], np.uint8(IGNORE))


def locate(root: Path, parts: dict[str, str]) -> dict[str, Path]:
    """Find the parts of a download in `root`, one level above it or one below.

    Args:
        root: folder that the user named.
        parts: for each relative path, the download that holds it. The annotations of COCO may lie
            in `annotations` or beside it: their inner archives unpack wherever they are unpacked.

    Returns:
        The path of each part. InputError names the first that is missing, and its download.
    """
    if not root.is_dir():
        raise InputError(f"--data {root} is not a folder")
    best: dict[str, Path] = {}
    root = root.resolve()
    for base in (root, root.parent, *sorted(path for path in root.iterdir() if path.is_dir())):
        places = {part: [base / part, base / "annotations" / part] for part in parts}
        found = {part: next(filter(Path.exists, paths), None) for part, paths in places.items()}
        best = max(best, {part: path for part, path in found.items() if path}, key=len)
    for part, download in parts.items():
        if part not in best:
            raise InputError(f"--data {root}: {part} is not there; it comes with {download}")
    return best


def read_json(path: Path) -> dict:
    """Read a JSON file; InputError where it is broken."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not readable as JSON ({error})") from error


def pair_files(
    images: Path, masks: Path, stems: Iterable[str] | None = None
) -> list[tuple[Path, Path]]:
    """Pair images and PNG masks of the same stem: those of `stems`, or all images of the folder.

    InputError: a stem has no image, an image has no mask, or there is nothing.
    """
    files = {p.stem: p for p in sorted(images.iterdir()) if p.suffix.lower() in IMAGE_TYPES}
    labelled = {path.stem: path for path in masks.iterdir() if path.suffix.lower() == ".png"}
    stems = list(files if stems is None else stems)
    for stem in stems:
        if stem not in files:
            raise InputError(f"{images} has no image {stem}")
        if stem not in labelled:
            raise InputError(f"{files[stem]} has no mask {masks / stem}.png")
    if not stems:
        raise InputError(f"{images} has no image to use")
    return [(files[stem], labelled[stem]) for stem in stems]


def load_voc(root: Path) -> Segmentation:
    """Pascal VOC 2012; trains on trainaug (SBD) where SegmentationClassAug and its list are there."""
    folders = ("JPEGImages", "SegmentationClass")
    lists = ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt")
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    part = locate(root, dict.fromkeys(folders + lists, "VOCtrainval_11-May-2012.tar"))
    train, masks = part[lists[0]], part["SegmentationClass"]
    augmented = masks.with_name("SegmentationClassAug")
    if augmented.is_dir() and train.with_name("trainaug.txt").exists():
        train, masks = train.with_name("trainaug.txt"), augmented

    def stems(path: Path) -> list[str]:
        # Some copies of trainaug.txt give the two paths of a pair instead of its name.
        return [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]

    return Segmentation(
        pair_files(part["JPEGImages"], masks, stems(train)),
        pair_files(part["JPEGImages"], part["SegmentationClass"], stems(part[lists[1]])),
        VOC_CLASSES,
        functools.partial(
            read_class_mask, table=value_table({IGNORE: IGNORE} | {n: n for n in range(21)})
        ),
    )


def load_ade20k(root: Path) -> Segmentation:
    """ADE20K scene parsing: 150 classes, in the masks 1 to 150; 0 is no label."""
    parts = [f"{a}/{b}" for a in ("images", "annotations") for b in ("training", "validation")]
    part = locate(
        root, dict.fromkeys([*parts, "objectInfo150.txt"], "ADEChallengeData2016.zip")
    )
    text = part["objectInfo150.txt"].read_text()
    rows = re.findall(r"^\s*(\d+)\s[\s\d.]*([^\d\s.][^\t,;\n]*)", text, re.MULTILINE)
    classes = [name.strip() for _, name in rows]
    if [int(number) for number, _ in rows] != list(range(1, 151)):
        raise InputError(f"{part['objectInfo150.txt']} does not name the classes 1 to 150")
    table = value_table({0: IGNORE} | {n + 1: n for n in range(150)})
    return Segmentation(
        pair_files(part[parts[0]], part[parts[2]]),
        pair_files(part[parts[1]], part[parts[3]]),
        classes,
        functools.partial(read_class_mask, table=table),
    )


def load_coco_things(root: Path) -> Segmentation:
    """COCO 2017 panoptic: the super-categories of things; all stuff is ignored."""
    part = locate(
        root,
        {f"{split}2017": f"{split}2017.zip" for split in ("train", "val")}
        | dict.fromkeys(
            [f"panoptic_{split}2017{end}" for end in (".json", "") for split in ("train", "val")],
            "panoptic_annotations_trainval2017.zip",
        ),
    )
    segments, pairs, names = {}, {}, []
    for split in ("train", "val"):
        content = read_json(part[f"panoptic_{split}2017.json"])
        things = {c["id"]: c["supercategory"] for c in content["categories"] if c["isthing"]}
        names = sorted(set(things.values()))
        masks = part[f"panoptic_{split}2017"]
        for item in content["annotations"]:
            info = sorted((s["id"], s["category_id"]) for s in item["segments_info"])
            known = [(i, names.index(things[c]) if c in things else IGNORE) for i, c in info]
            ids, classes = np.array(known or [(0, IGNORE)]).T
            segments[masks / item["file_name"]] = ids, classes.astype(np.uint8)
        stems = [Path(item["file_name"]).stem for item in content["annotations"]]
        pairs[split] = pair_files(part[f"{split}2017"], masks, stems)
    read_mask = functools.partial(read_panoptic_mask, segments=segments)
    return Segmentation(pairs["train"], pairs["val"], names, read_mask)


def load_coco_stuff(root: Path) -> Segmentation:
    """COCO 2017 stuff: its super-categories; things (0) and `other` (183) are ignored."""
    part = locate(
        root,
        {f"{split}2017": f"{split}2017.zip" for split in ("train", "val")}
        | dict.fromkeys(
            ["stuff_val2017.json", "stuff_train2017_pixelmaps", "stuff_val2017_pixelmaps"],
            "stuff_annotations_trainval2017.zip",
        ),
    )
    # Both annotation files hold the same categories, and that of val is 20 times as small.
    table = {c["id"]: c["supercategory"] for c in read_json(part["stuff_val2017.json"])["categories"]}
    names = sorted(set(table.values()) - {"other"})
    classes = {i: names.index(name) if name in names else IGNORE for i, name in table.items()}
    pairs = {}
    for split in ("train", "val"):
        masks = part[f"stuff_{split}2017_pixelmaps"]
        stems = sorted(path.stem for path in masks.glob("*.png"))
        pairs[split] = pair_files(part[f"{split}2017"], masks, stems)
    read_mask = functools.partial(read_class_mask, table=value_table({0: IGNORE} | classes))
    return Segmentation(pairs["train"], pairs["val"], names, read_mask)


def load_folder(root: Path) -> Segmentation:
    """Any folder with train/images, train/masks, val/images, val/masks.

    A mask is a PNG of class numbers, 255 where there is no label. A line of classes.txt names a
    class, the first class 0; without that file the largest value in the masks tells their number.
    """
    parts = [f"{split}/{kind}" for split in ("train", "val") for kind in ("images", "masks")]
    part = locate(root, dict.fromkeys(parts, "every data set of this layout"))
    pairs = [pair_files(part[parts[0]], part[parts[1]]), pair_files(part[parts[2]], part[parts[3]])]
    names = part[parts[0]].parent.parent / "classes.txt"
    if names.exists():
        classes = names.read_text().split("\n")
        classes = [line.strip() for line in classes if line.strip()]
    else:
        highest = -1
        for _, mask in progress([p for split in pairs for p in split], "reading masks"):
            values = read_values(mask)
            highest = max(highest, values[values != IGNORE].max(initial=-1))
            if highest >= INVALID:
                raise InputError(f"{mask} holds the value {highest}; classes are 0 to 253")
        classes = [f"class {n}" for n in range(highest + 1)]
    if not 2 <= len(classes) < INVALID:
        raise InputError(f"--data {root} has {len(classes)} classes; from 2 to 253 are needed")
    table = value_table({IGNORE: IGNORE} | {n: n for n in range(len(classes))})
    return Segmentation(*pairs, classes, functools.partial(read_class_mask, table=table))


DATASETS = {
    "voc": load_voc,
    "ade20k": load_ade20k,
    "coco-things": load_coco_things,
    "coco-stuff": load_coco_stuff,
    "folder": load_folder,
}


class ImagesAndMasks(Dataset):
    """Images (3, S, S) float, normalised, with masks (M, M) uint8 of the same part of the scene.

    Args:
        pairs: image and mask files.
        read_mask: mask file to classes.
        size, mask_size: S and M in pixels. Images are resized bilinearly, masks to the nearest.
        crop: None for the whole image, or (seed, epoch): a random resized crop of 80 to 100 % of
            the area and a random flip, a function of seed, epoch and index alone.
    """

    def __init__(self, pairs, read_mask, size: int, mask_size: int, crop: tuple | None = None):
        self.pairs, self.read_mask, self.crop = pairs, read_mask, crop
        self.size, self.mask_size = size, mask_size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, mask_path = self.pairs[index]
        image, mask = read_image(path), Image.fromarray(self.read_mask(mask_path))
        if image.size != mask.size:
            raise InputError(
                f"{path} is {image.width} x {image.height} pixels, "
                f"its mask {mask_path} {mask.width} x {mask.height}"
            )
        box = (0, 0, *image.size)
        if self.crop is not None:
            with torch.random.fork_rng(devices=[]):
                key = np.random.SeedSequence((*self.crop, index)).generate_state(1)
                torch.manual_seed(int(key[0]))
                y, x, h, w = RandomResizedCrop.get_params(image, (0.8, 1.0), (3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            box = (x, y, x + w, y + h)
        image = image.resize((self.size,) * 2, Image.Resampling.BILINEAR, box)
        mask = mask.resize((self.mask_size,) * 2, Image.Resampling.NEAREST, box)
        pixels, labels = np.array(image), np.array(mask)
        if self.crop is not None and flip:
            pixels, labels = pixels[:, ::-1].copy(), labels[:, ::-1].copy()
        return normalise(torch.from_numpy(pixels).permute(2, 0, 1)), torch.from_numpy(labels)


def normalise(image: Tensor) -> Tensor:
    """Subtract the mean of ImageNet and divide by its deviation: (3, H, W) uint8 to float."""
    mean, std = image.new_tensor([0.485, 0.456, 0.406], dtype=torch.float), [0.229, 0.224, 0.225]
    return (image / 255 - mean.view(3, 1, 1)) / mean.new_tensor(std).view(3, 1, 1)


def batches(
    data: Dataset, size: int, workers: int, device: torch.device, order: list | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and masks on the device, in order or in the order given."""
    loader = DataLoader(
        data, size, sampler=order, num_workers=workers, pin_memory=device.type == "cuda"
    )
    for images, masks in loader:
        yield images.to(device, non_blocking=True), masks.to(device, non_blocking=True)


@torch.no_grad()
def patch_features(backbone: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Features (B, D, H/p, W/p) in float32 of images (B, 3, H, W); `precision` fp32 or bf16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return backbone(images).float()


# -------------------------------------------------------------------------------------- metric
# One confusion matrix over the whole validation set. The mean leaves out a class that neither
# occurs nor is predicted: its IoU is 0/0.


def confusion_matrix(prediction: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Count pixels by (true class, predicted class).

    Args:
        prediction, mask: class numbers of the same shape; pixels of mask IGNORE count nowhere.

    Returns:
        (classes, classes) int64.
    """
    valid = mask != IGNORE
    pairs = mask[valid].long() * classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(confusion: Tensor) -> Tensor:
    """IoU = TP / (TP + FP + FN) per class, (C,) float64; nan where a class is not counted."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


# ---------------------------------------------------------------------------------- in-context
# Segmentation by retrieval, "Towards in-context scene understanding" (Balazevic et al., 2023). The
# memory holds features of training patches and the class frequencies of their pixels.


def patch_labels(masks: Tensor, classes: int, patch: int) -> Tensor:
    """Class frequencies of the labelled pixels of each patch; all zero where there are none.

    Args:
        masks: (B, S, S) class numbers or IGNORE, S a multiple of `patch`.

    Returns:
        (B, S/patch * S/patch, classes) float32; patches row by row, as features.flatten(2) has them.
    """
    batch, side = len(masks), masks.shape[1] // patch
    cells = masks.view(batch, side, patch, side, patch).transpose(2, 3).reshape(-1, patch**2).long()
    cells = cells.masked_fill(cells == IGNORE, classes)  # one slot more, cut off below
    slots = torch.arange(len(cells), device=cells.device)[:, None] * (classes + 1) + cells
    counts = torch.bincount(slots.flatten(), minlength=len(cells) * (classes + 1))
    counts = counts.view(batch, side**2, classes + 1)[..., :classes].float()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def choose_patches(labels: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Choose the patches of one image for the memory, so that rare classes are kept.

    Args:
        labels: (P, C) class frequencies of the patches, all zero where there is no label.
        count: how many to take at most; fewer are taken where fewer have labels.
        uniform: (P,) random numbers in 0-1.

    Returns:
        Indices of the patches with the smallest u * (sum over the classes in the patch of the
        number of the image's patches with that class), ascending.
    """
    present = (labels > 0).float()
    score = uniform * (present @ present.sum(0))
    score[present.sum(1) == 0] = torch.inf
    count = min(count, int(score.isfinite().sum()))
    return score.topk(count, largest=False).indices.sort().values


def search(queries: Tensor, memory: Tensor, k: int, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Find the k largest dot products of each query with the memory: exact, never the full matrix.

    Similarities are computed tile by tile, and of each only the maxima of small groups of memory
    vectors are kept. The k best lie within the k groups of largest maximum: these groups alone
    are compared again. Groups of maxima are treated likewise, as a plain topk is slow.

    Args:
        queries: (Q, D). memory: (N, D) of the same type.
        k: neighbours, 1 to N.
        block_bytes: about how much may be allocated, beside the result.

    Returns:
        Similarities (Q, k) float32, descending, and indices (Q, k) int64 into the memory.
    """
    # The tile fits a CPU's cache, or fills a GPU. Larger groups keep the maxima of large memories small.
    on_cpu, width = queries.device.type == "cpu", queries.element_size()
    tile = min(2**19 if on_cpu else 2**27, block_bytes // 2 // width)
    group, outer = max(8, len(memory) >> 17), 64
    rows = -(-len(memory) // (group * outer)) * outer
    block = max(1, min(512 if on_cpu else 4096, len(queries), block_bytes // 2 // (rows * width)))
    step = max(1, tile // (block * group)) * group
    maxima = queries.new_full((rows, block), -torch.inf)  # rows past the memory stay at -inf
    tile_out = queries.new_empty(step, block)
    chunk = max(1, tile // (k * group * queries.shape[1]))

    def members(groups: Tensor, size: int) -> Tensor:  # (B, k) -> (B, k * size)
        return (groups[..., None] * size + torch.arange(size, device=groups.device)).flatten(1)

    similarities, indices = [], []
    for q in queries.split(block):
        best = maxima[:, : len(q)]
        for start in range(0, len(memory), step):
            part = memory[start : start + step]
            products = torch.mm(part, q.T, out=tile_out[: len(part), : len(q)])
            if len(part) % group:
                products = F.pad(products, (0, 0, 0, -len(part) % group), value=-torch.inf)
            into = best[start // group :][: -(-len(part) // group)]
            torch.amax(products.unflatten(0, (-1, group)), 1, out=into)
        outer_groups = best.unflatten(0, (-1, outer)).amax(1).T  # (B, rows / outer)
        candidates = members(outer_groups.topk(min(k, rows // outer)).indices, outer)
        top = best.T.gather(1, candidates).topk(min(k, candidates.shape[1])).indices
        candidates = members(candidates.gather(1, top), group)  # (B, k * group)
        products = torch.cat(
            [
                (memory[c] @ vector[..., None]).squeeze(-1)
                for c, vector in zip(
                    candidates.clamp(max=len(memory) - 1).split(chunk), q.split(chunk), strict=True
                )
            ]
        )
        products = products.float().masked_fill(candidates >= len(memory), -torch.inf)
        values, at = products.topk(k)
        similarities.append(values)
        indices.append(candidates.gather(1, at))
    return torch.cat(similarities), torch.cat(indices)


def vote(similarities: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Average the labels (Q, k, C) of neighbours with a softmax of (Q, k) similarities: (Q, C)."""
    weights = (similarities / temperature).softmax(-1)
    return (weights[:, None] @ labels.float()).squeeze(1)
