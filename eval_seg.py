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
import colorsys
import contextlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import normalize, pil_to_tensor, to_tensor

from neco import InputError, load_backbone

# ----------------------------------------------------------------------------------- data sets
# Every data set becomes lists of (image, mask) paths, the class names, and a function that reads a
# mask as class numbers. The layouts are those of the official downloads, nothing is prepared.

IGNORE, INVALID = 255, 254  # marks in a mask: pixel without label, value that no class has
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
VOC_CLASSES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog
horse motorbike person pottedplant sheep sofa train tvmonitor"""


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
    # By way of RGBA, as Pillow warns of what a palette with transparency loses.
    return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")


def read_values(path: Path) -> np.ndarray:
    """Read a mask file of one number per pixel, grey or palette, as (H, W) integers."""
    image = open_image(path)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise InputError(f"{path} is an image of mode {image.mode}, not one class number per pixel")
    with open(path, "rb") as file:
        header = file.read(26)
    if header.startswith(b"\x89PNG") and header[24] in (2, 4) and header[25] == 0:
        raise InputError(
            f"{path} is a grey PNG of {header[24]} bits, which are scaled: save 8 bits"
        )
    return np.asarray(image).astype(np.int32)


def read_class_mask(path: Path, classes: dict[int, int]) -> np.ndarray:
    """Read a mask and replace its values by their classes; InputError where one has no class."""
    table = np.full(257, INVALID, np.uint8)  # the last entry stands for all other values
    table[list(classes)] = list(classes.values())
    values = read_values(path)
    mask = table[values.clip(-1, 256)]
    if (mask == INVALID).any():
        raise InputError(f"{path} holds the value {values[mask == INVALID][0]}, which is no class")
    return mask


def read_panoptic_mask(path: Path, segments: dict[Path, dict[int, int]]) -> np.ndarray:
    """Read a COCO panoptic PNG, in which a pixel is the segment R + 256 G + 65536 B.

    `segments` gives the class of each segment of each file; those it leaves out are ignored.
    """
    image = open_image(path)
    if image.mode != "RGB":
        raise InputError(f"{path} is an image of mode {image.mode}, not a panoptic RGB mask")
    ids = np.asarray(image) @ np.array([1, 256, 65536])
    mask = np.full(ids.shape, IGNORE, np.uint8)
    for segment, number in segments[path.with_suffix("")].items():
        mask[ids == segment] = number
    return mask


def locate(root: Path, parts: dict[str, str]) -> dict[str, Path]:
    """Find the parts of a download in `root`, one level above it or one below.

    Args:
        root: folder that the user named.
        parts: for each relative path, the download that holds it. The annotations of COCO may lie
            in `annotations` or beside it: their inner archives unpack wherever they are unpacked.

    Returns:
        The path of each part, in the order asked. InputError names the first that is missing,
        and its download.
    """
    if not root.is_dir():
        raise InputError(f"--data {root} is not a folder")
    best: dict[str, Path] = {}
    root = root.resolve()
    whole = []
    for base in (root, root.parent, *sorted(path for path in root.iterdir() if path.is_dir())):
        found = {}
        for part in parts:
            for path in (base / "annotations" / part, base / part):
                if path.exists():
                    found[part] = path
        best = max(best, found, key=len)
        whole += [base] if len(found) == len(parts) else []
    if len(whole) > 1 and whole[0] not in (root, root.parent):
        raise InputError(f"--data {root} has several such data sets: name {whole[0]}, or another")
    for part, download in parts.items():
        if part not in best:
            raise InputError(f"--data {root}: {part} is not there; it comes with {download}")
    return best


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file; InputError where it is none."""
    try:
        return path.read_text(encoding="utf-8").strip().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8") from error


def read_json(path: Path, *keys: str) -> list:
    """Read the values of keys of a COCO annotation file; InputError where it does not hold them."""
    try:
        content = json.loads(path.read_bytes())
        return [content[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no annotation file of COCO ({error!r})") from error


def pair_files(images: Path, masks: Path, stems: list[str] | None = None) -> list:
    """Pair images and PNG masks of the same stem: those of `stems`, or all images of the folder.

    InputError: a stem has no image, an image has no mask, or there is nothing.
    """
    files = {p.stem: p for p in sorted(images.iterdir()) if p.suffix.lower() in IMAGE_TYPES}
    labelled = {p.stem: p for p in masks.iterdir() if p.suffix.lower() == ".png"}
    stems = list(files) if stems is None else stems
    for stem in stems:
        if stem not in files:
            raise InputError(f"{images} has no image {stem}")
        if stem not in labelled:
            raise InputError(f"{files[stem]} has no mask {masks / stem}.png")
    if not stems:
        raise InputError(
            f"{images} has no image to use: it, {masks} or the list of the split is empty"
        )
    return [(files[stem], labelled[stem]) for stem in stems]


def load_voc(root: Path) -> Segmentation:
    """Pascal VOC 2012; trains on trainaug (SBD) where its list and masks are there."""
    parts = ["JPEGImages", "SegmentationClass"]
    parts += [f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")]
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    found = locate(root, dict.fromkeys(parts, "VOCtrainval_11-May-2012.tar"))
    images, masks, train, val = found.values()
    augmented = train.with_name("trainaug.txt"), masks.with_name("SegmentationClassAug")

    def pairs(names: Path, masks: Path) -> list[tuple[Path, Path]]:
        # Some copies of trainaug.txt give the two paths of a pair instead of its name.
        lines = [line.split() for line in read_lines(names)]
        return pair_files(images, masks, [Path(line[0]).stem for line in lines if line])

    training = augmented if all(path.exists() for path in augmented) else (train, masks)
    read_mask = partial(read_class_mask, classes={n: n for n in [*range(21), IGNORE]})
    return Segmentation(pairs(*training), pairs(val, masks), VOC_CLASSES.split(), read_mask)


def load_ade20k(root: Path) -> Segmentation:
    """ADE20K scene parsing: 150 classes, in the masks 1 to 150; 0 is no label."""
    parts = [f"{a}/{b}" for b in ("training", "validation") for a in ("images", "annotations")]
    parts.append("objectInfo150.txt")
    found = locate(root, dict.fromkeys(parts, "ADEChallengeData2016.zip"))
    *folders, names = found.values()
    rows = [line.split("\t") for line in read_lines(names)[1:]]
    if [row[0].strip() for row in rows] != [str(n) for n in range(1, 151)]:
        raise InputError(f"{names} does not name the classes 1 to 150")
    classes = [row[-1].split(",")[0].strip() for row in rows]  # the first of several synonyms
    read_mask = partial(read_class_mask, classes={0: IGNORE} | {n + 1: n for n in range(150)})
    return Segmentation(pair_files(*folders[:2]), pair_files(*folders[2:]), classes, read_mask)


COCO_IMAGES = {"train2017": "train2017.zip", "val2017": "val2017.zip"}


@contextlib.contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what an annotation file of another kind leads to into a sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no annotation file of COCO of this kind ({error!r})"
        ) from error


def load_coco_things(root: Path) -> Segmentation:
    """COCO 2017 panoptic: the super-categories of things; all stuff is ignored."""
    parts = [f"panoptic_{split}2017{end}" for end in (".json", "") for split in ("train", "val")]
    archive = "panoptic_annotations_trainval2017.zip"
    found = locate(root, COCO_IMAGES | dict.fromkeys(parts, archive))
    segments, pairs = {}, []
    for split in COCO_IMAGES:
        annotation_file, masks = found[f"panoptic_{split}.json"], found[f"panoptic_{split}"]
        categories, annotations = read_json(annotation_file, "categories", "annotations")
        with parsing(annotation_file):
            things = {c["id"]: c["supercategory"] for c in categories if c["isthing"]}
            names = sorted(set(things.values()))
            classes = {i: names.index(name) for i, name in things.items()}
            for item in annotations:
                segments[(masks / item["file_name"]).with_suffix("")] = {
                    segment["id"]: classes[segment["category_id"]]
                    for segment in item["segments_info"]
                    if segment["category_id"] in classes
                }
            stems = [Path(item["file_name"]).stem for item in annotations]
        if not names:
            raise InputError(f"{annotation_file} has no category of things")
        pairs.append(pair_files(found[split], masks, stems))
    return Segmentation(*pairs, names, partial(read_panoptic_mask, segments=segments))


def load_coco_stuff(root: Path) -> Segmentation:
    """COCO 2017 stuff: its super-categories; things (0) and `other` (183) are ignored."""
    # Both annotation files hold the same categories, and that of val is 20 times as small.
    parts = ["stuff_val2017.json", "stuff_train2017_pixelmaps", "stuff_val2017_pixelmaps"]
    found = locate(root, COCO_IMAGES | dict.fromkeys(parts, "stuff_annotations_trainval2017.zip"))
    (categories,) = read_json(found["stuff_val2017.json"], "categories")
    with parsing(found["stuff_val2017.json"]):
        stuff = {c["id"]: c["supercategory"] for c in categories}
    names = sorted(set(stuff.values()) - {"other"})
    classes = {i: names.index(name) if name in names else IGNORE for i, name in stuff.items()}
    pairs = []
    for split in COCO_IMAGES:
        masks = found[f"stuff_{split}_pixelmaps"]
        pairs.append(pair_files(found[split], masks, sorted(p.stem for p in masks.glob("*.png"))))
    return Segmentation(*pairs, names, partial(read_class_mask, classes={0: IGNORE} | classes))


def load_folder(root: Path) -> Segmentation:
    """Any folder with train/images, train/masks, val/images, val/masks.

    A mask is a PNG of class numbers, 255 where there is no label. A line of classes.txt names a
    class, the first class 0; without that file the largest value in the masks tells their number.
    """
    parts = [f"{split}/{kind}" for split in ("train", "val") for kind in ("images", "masks")]
    found = locate(root, dict.fromkeys(parts, "every data set of this layout"))
    images, masks, *val = found.values()
    pairs = [pair_files(images, masks), pair_files(*val)]
    names = images.parent.with_name("classes.txt")
    if names.exists():
        classes = read_lines(names)
    else:
        highest = -1
        for _, mask in progress([*pairs[0], *pairs[1]], "reading masks"):
            values = read_values(mask)
            highest = max(highest, values[values != IGNORE].max(initial=-1))
            if highest >= INVALID:
                raise InputError(f"{mask} holds the value {highest}; classes are 0 to 253")
        classes = [f"class {n}" for n in range(highest + 1)]
    if not 2 <= len(classes) < INVALID:
        raise InputError(f"--data {root} has {len(classes)} classes; from 2 to 253 are needed")
    numbers = {n: n for n in [*range(len(classes)), IGNORE]}
    return Segmentation(*pairs, classes, partial(read_class_mask, classes=numbers))


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
            sizes = [f"{part.width} x {part.height} pixels" for part in (image, mask)]
            raise InputError(f"{path} is {sizes[0]}, its mask {mask_path} {sizes[1]}")
        box, flip = (0, 0, *image.size), False
        if self.crop is not None:
            with torch.random.fork_rng(devices=[]):
                key = np.random.SeedSequence((*self.crop, index)).generate_state(1)
                torch.manual_seed(int(key[0]))
                y, x, h, w = RandomResizedCrop.get_params(image, (0.8, 1.0), (3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            box = (x, y, x + w, y + h)
        image = image.resize((self.size,) * 2, Image.Resampling.BILINEAR, box)
        mask = mask.resize((self.mask_size,) * 2, Image.Resampling.NEAREST, box)
        if flip:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        return normalize(to_tensor(image), MEAN, STD), pil_to_tensor(mask)[0]


def progress(items: Iterable, label: str) -> Iterator:
    """Yield the items; on a terminal, show how far it is and the time left in one line."""
    start, total = time.monotonic(), len(items)
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = round((time.monotonic() - start) / done * (total - done))
            line = f"{label}: {done}/{total}, {left // 60}:{left % 60:02} left"
            shown = line if done < total else ""
            print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)


@torch.no_grad()
def patch_features(
    backbone: nn.Module,
    dataset: Dataset,
    label: str,
    workers: int = 0,
    precision: str = "fp32",
    batch_size: int = 16,
    order: list[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features of a data set, batch by batch, on the device of the backbone.

    Args:
        backbone: as `load_backbone` gives it, with patch size p.
        dataset: ImagesAndMasks.
        label: what to call this on a terminal.
        workers, precision: processes that read images; fp32 or bf16 for the backbone.
        order: numbers of the images; all in the order of the files where it is None.

    Yields:
        Features (B, D, S/p, S/p) float32, and masks (B, M, M) uint8.
    """
    device = next(backbone.parameters()).device
    pin = device.type == "cuda"
    loader = DataLoader(dataset, batch_size, sampler=order, num_workers=workers, pin_memory=pin)
    for images, masks in progress(loader, label):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = backbone(images.to(device, non_blocking=True))
        if not features.isfinite().all():
            raise InputError("the features are not finite: --weights are broken, or try fp32")
        yield features.float(), masks.to(device, non_blocking=True)


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


def mean_iou(confusion: Tensor) -> float:
    """Mean IoU in percent over the classes that are counted."""
    return 100 * class_iou(confusion).nanmean().item()


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Iterable[Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    keep: Iterable[int] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """Compare the predictions for a data set with its masks.

    Args:
        predict: features (B, D, h, w) to B maps (M, M) of class numbers.
        batches: features and masks (B, M, M), as `patch_features` yields them.
        keep: numbers of the images whose predictions are wanted.

    Returns:
        The confusion matrix (classes, classes) int64, and the predictions asked for.
    """
    confusion, kept, index = torch.zeros(classes, classes, dtype=torch.int64), {}, 0
    for features, masks in batches:
        for prediction, mask in zip(predict(features), masks, strict=True):
            confusion += confusion_matrix(prediction, mask, classes).cpu()
            if index in keep:
                kept[index] = prediction.cpu()
            index += 1
    if not confusion.any():
        raise InputError("the masks of the validation images hold no labelled pixel")
    return confusion, kept


# ---------------------------------------------------------------------------------- in-context
# Segmentation by retrieval, "Towards in-context scene understanding" (Balazevic et al., 2023). The
# memory holds features of training patches and the class frequencies of their pixels.


def patch_labels(masks: Tensor, classes: int, patch: int) -> Tensor:
    """Class frequencies of the labelled pixels of each patch; all zero where there are none.

    Args:
        masks: (B, S, S) class numbers or IGNORE, S a multiple of `patch`.

    Returns:
        (B, S/patch * S/patch, classes) float32; patches row by row.
    """
    cells = F.pixel_unshuffle(masks[:, None].long(), patch).flatten(2).mT  # (B, P, patch * patch)
    cells = cells.masked_fill(cells == IGNORE, classes)  # one class more, cut off below
    counts = torch.zeros(*cells.shape[:2], classes + 1, device=cells.device)
    counts.scatter_add_(2, cells, torch.ones_like(cells, dtype=counts.dtype))
    counts = counts[..., :classes]
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
    # A tile fits a CPU's cache, or fills a GPU; a large memory takes larger groups.
    on_cpu, width = queries.device.type == "cpu", queries.element_size()
    tile = min(2**19 if on_cpu else 2**27, block_bytes // 2 // width)
    group, outer = max(8, len(memory) >> 17), 64
    rows = -(-len(memory) // (group * outer)) * outer
    block = max(1, min(512 if on_cpu else 4096, len(queries), block_bytes // 2 // (rows * width)))
    block = min(block, max(1, block_bytes // (k * outer * 8)))  # the candidates of a block
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
        rows_of = candidates.clamp(max=len(memory) - 1).split(chunk)
        pairs = zip(rows_of, q[..., None].split(chunk), strict=True)
        products = torch.cat([memory[chosen] @ part for chosen, part in pairs]).squeeze(-1)
        products = products.float().masked_fill(candidates >= len(memory), -torch.inf)
        values, at = products.topk(k)
        similarities.append(values)
        indices.append(candidates.gather(1, at))
    return torch.cat(similarities), torch.cat(indices)


def build_memory(
    backbone: nn.Module,
    data: Segmentation,
    size: int,
    capacity: int,
    seed: int = 0,
    workers: int = 0,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Collect the memory from the training images, resized to (size, size).

    Args:
        backbone: as `load_backbone` gives it, on the device where the memory is to be.
        capacity: patches at most; an image gives capacity / images of them at most.

    Returns:
        L2-normalised features (N, D) and class frequencies (N, C), in half precision on a GPU.
    """
    device, quota = next(backbone.parameters()).device, capacity // len(data.train)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    rows = len(data.train) * min(quota, (size // backbone.patch_size) ** 2)
    memory = torch.empty(rows, backbone.embed_dim, dtype=dtype, device=device)
    frequencies = torch.empty(rows, len(data.classes), dtype=dtype, device=device)
    used = index = 0
    dataset = ImagesAndMasks(data.train, data.read_mask, size, size)
    for features, masks in patch_features(backbone, dataset, "memory", workers, precision):
        features = F.normalize(features, dim=1).flatten(2).mT  # (B, P, D)
        labels = patch_labels(masks, len(data.classes), backbone.patch_size)  # (B, P, C)
        for feature, label in zip(features, labels, strict=True):
            uniform = np.random.default_rng((seed, index)).random(len(label), np.float32)
            chosen = choose_patches(label, quota, torch.from_numpy(uniform).to(device))
            memory[used : used + len(chosen)] = feature[chosen]
            frequencies[used : used + len(chosen)] = label[chosen]
            used, index = used + len(chosen), index + 1
    if not used:
        raise InputError("the masks of the training images hold no labelled pixel")
    return memory[:used], frequencies[:used]


def in_context(
    backbone: nn.Module,
    data: Segmentation,
    size: int,
    neighbours: int = 30,
    temperature: float = 0.02,
    memory: int = 10_240_000,
    block_memory: int = 256,
    seed: int = 0,
    workers: int = 0,
    precision: str = "fp32",
    keep: Iterable[int] = (),
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Segment the validation images by the nearest neighbours of their patches.

    Args:
        backbone: as `load_backbone` gives it.
        size: side of images and masks in pixels, at which predictions are compared.
        neighbours, temperature: how many vote on a patch, and the sharpness of their weights.
        memory: patches in the memory at most.
        block_memory: working memory of the search in MB.
        keep: numbers of the images whose predictions are wanted.

    Returns:
        A list with the confusion matrix (C, C), and the predictions (size, size) asked for.
    """
    bank, frequencies = build_memory(backbone, data, size, memory, seed, workers, precision)
    print(f"  memory: {len(bank)} patches", flush=True)

    def predict(features: Tensor) -> Iterator[Tensor]:
        queries = F.normalize(features, dim=1).movedim(1, -1)  # (B, h, w, D)
        shape = queries.shape[:-1]
        queries = queries.flatten(0, 2).to(bank.dtype)
        found = search(queries, bank, min(neighbours, len(bank)), block_memory * 2**20)
        for similarities, indices in zip(*(part.view(*shape, -1) for part in found), strict=True):
            weights = (similarities / temperature).softmax(-1)  # (h, w, k)
            votes = (weights[..., None, :] @ frequencies[indices].float()).squeeze(-2)  # (h, w, C)
            votes = F.interpolate(votes.movedim(-1, 0)[None], size, mode="bilinear")
            yield votes[0].argmax(0)

    dataset = ImagesAndMasks(data.val, data.read_mask, size, size)
    batches = patch_features(backbone, dataset, "in-context", workers, precision)
    confusion, kept = evaluate(predict, batches, len(data.classes), keep)
    print(f"  mIoU {mean_iou(confusion):.2f}", flush=True)
    return [confusion], kept


# -------------------------------------------------------------------------------------- linear
# How much a linear layer reads from frozen features: one 1x1 convolution, trained with SGD at a
# resolution of 100 x 100. The validation after the last epoch is the result.

PROBE_SIZE = 100


def probe_logits(probe: nn.Module, features: Tensor) -> Tensor:
    """Class scores (B, C, 100, 100) of features (B, D, h, w) by a 1x1 convolution.

    The protocol upsamples the features and then convolves. Both steps are linear and the weights
    of an interpolation sum to 1, so the other order gives the same for a fraction of the work.
    """
    return F.interpolate(probe(features), PROBE_SIZE, mode="bilinear")


def probe_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0, not nan, where there are none."""
    total = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


def linear(
    backbone: nn.Module,
    data: Segmentation,
    size: int,
    epochs: int = 25,
    lr: float = 0.01,
    batch_size: int = 128,
    seed: int = 0,
    workers: int = 0,
    precision: str = "fp32",
    keep: Iterable[int] = (),
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Train a linear probe on the training images and validate it after every epoch.

    Args:
        backbone: as `load_backbone` gives it; it is not changed.
        size: side of the images in pixels.
        epochs: the learning rate drops to a tenth after four fifths of them (20 of 25).
        keep: numbers of the validation images whose predictions are wanted.

    Returns:
        The confusion matrix (C, C) of every epoch, and predictions (100, 100) of the last.
    """
    device, classes = next(backbone.parameters()).device, len(data.classes)
    probe = nn.Conv2d(backbone.embed_dim, classes, 1)
    nn.init.normal_(probe.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(probe.bias)
    probe = probe.to(device)
    optimizer = torch.optim.SGD(probe.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.8 * epochs))])

    def predict(features: Tensor) -> Tensor:
        return probe_logits(probe, features).argmax(1)

    history, labelled = [], False
    for epoch in range(epochs):
        label = f"epoch {epoch + 1}/{epochs}"
        order = np.random.default_rng((seed, epoch)).permutation(len(data.train)).tolist()
        dataset = ImagesAndMasks(data.train, data.read_mask, size, PROBE_SIZE, (seed, epoch))
        batches = patch_features(backbone, dataset, label, workers, precision, batch_size, order)
        for features, masks in batches:
            loss = probe_loss(probe_logits(probe, features), masks)
            if not loss.isfinite():
                raise InputError(
                    f"--lr {lr}: the loss of the probe is not finite, give a lower one"
                )
            labelled = labelled or bool((masks != IGNORE).any())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if not labelled:
            raise InputError("the masks of the training images hold no labelled pixel")

        dataset = ImagesAndMasks(data.val, data.read_mask, size, PROBE_SIZE)
        batches = patch_features(backbone, dataset, f"{label}, validation", workers, precision)
        confusion, kept = evaluate(predict, batches, classes, keep)
        print(f"  {label}: mIoU {mean_iou(confusion):.2f}", flush=True)
        history.append(confusion)
    return history, kept


# ------------------------------------------------------------------------------------ pictures
# What the figures mean to the eye: images, true classes, predictions, and features as colours.
# Drawn with Pillow alone.


def class_colours(classes: int) -> np.ndarray:
    """Colours (256, 3) uint8 of class numbers, far apart for neighbours; white for IGNORE."""
    colours = np.full((256, 3), 255, np.uint8)
    for n in range(classes):
        value, saturation = (0.95, 0.7, 0.45)[n % 3], (0.85, 0.6)[n // 3 % 2]
        rgb = colorsys.hsv_to_rgb(0.618034 * n % 1, saturation, value)
        colours[n] = [round(255 * part) for part in rgb]
    return colours


def feature_colours(features: Tensor) -> np.ndarray:
    """First three principal components of maps (R, D, h, w) as colours (R, h, w, 3) uint8.

    One basis for all maps; each component runs from its 1st to its 99th percentile.
    """
    rows = features.movedim(1, -1).cpu().double().numpy()
    shape = rows.shape[:-1]
    rows = rows.reshape(-1, rows.shape[-1])
    rows -= rows.mean(0)
    axes = np.linalg.eigh(rows.T @ rows)[1][:, :-4:-1]  # largest variance first
    axes *= np.sign(axes[np.abs(axes).argmax(0), range(3)])  # eigh leaves the sign open
    colours = rows @ axes
    low, high = np.percentile(colours, [1, 99], axis=0)
    colours = ((colours - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return (255 * colours).astype(np.uint8).reshape(*shape, 3)


def draw_sheet(
    columns: dict[str, list[Image.Image]], legend: list[tuple[str, tuple]]
) -> Image.Image:
    """Lay out columns of images under their titles, with a legend of (name, colour) below.

    Each row takes the aspect ratio of its first image; the others are stretched to it.
    """
    width, gap, line = 280, 8, 24
    font = ImageFont.load_default(size=15)
    first = next(iter(columns.values()))
    heights = [min(2 * width, max(60, width * image.height // image.width)) for image in first]
    total = gap + len(columns) * (width + gap)
    entry = max(font.getlength(name) for name, _ in legend) + 44
    per_line = max(1, int((total - gap) // entry))
    bottom = line + gap + sum(heights) + gap * len(heights)
    sheet = Image.new("RGB", (total, bottom + -(-len(legend) // per_line) * line + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for left, (title, images) in zip(range(gap, total, width + gap), columns.items()):
        while font.getlength(title) > width:
            title = "..." + title[4:]
        draw.text((left, gap), title, "black", font)
        kind = Image.Resampling.BICUBIC if images is first else Image.Resampling.NEAREST
        top = line + gap
        for image, height in zip(images, heights, strict=True):
            sheet.paste(image.resize((width, height), kind), (left, top))
            top += height + gap
    for n, (name, colour) in enumerate(legend):
        x, y = gap + n % per_line * entry, bottom + n // per_line * line
        draw.rectangle((x, y + 2, x + 16, y + 18), colour, "black")
        draw.text((x + 22, y), name, "black", font)
    return sheet


def make_picture(
    data: Segmentation,
    indices: list[int],
    predictions: dict[str, dict[int, Tensor]],
    features: dict[str, Tensor],
) -> Image.Image:
    """Draw validation images as rows; columns: image, truth, and for each weights its results.

    Args:
        indices: numbers of the images.
        predictions: per weights and image number, the predicted classes at any resolution.
        features: per weights, the feature maps (len(indices), D, h, w).
    """
    colours, seen = class_colours(len(data.classes)), set()

    def draw(masks: list[np.ndarray]) -> list[Image.Image]:
        seen.update(*(np.unique(mask).tolist() for mask in masks))
        return [Image.fromarray(colours[mask]) for mask in masks]

    pairs = [data.val[n] for n in indices]
    columns = {"image": [read_image(path) for path, _ in pairs]}
    columns["truth"] = draw([data.read_mask(mask_path) for _, mask_path in pairs])
    for name, maps in features.items():
        columns[f"{name}: prediction"] = draw([predictions[name][n].numpy() for n in indices])
        columns[f"{name}: features"] = [Image.fromarray(part) for part in feature_colours(maps)]
    names = {n: name for n, name in enumerate(data.classes)} | {IGNORE: "no label"}
    return draw_sheet(columns, [(names[n], tuple(colours[n].tolist())) for n in sorted(seen)])


# -------------------------------------------------------------------------------- command line
# All that can be checked is checked before the first hour is spent. Bad input ends in one sentence
# and exit status 2.

METHODS = {  # function, default size, and the flags that it takes
    "in-context": (in_context, 518, ("neighbours", "temperature", "memory", "block_memory")),
    "linear": (linear, 448, ("epochs", "lr", "batch_size")),
}
NUMBERS = (  # flag, default, lowest, highest, help
    ("size", None, 1, 8192, "input side (default: 518 in-context, 448 linear, rounded down)"),
    ("neighbours", 30, 1, 10**4, "in-context: how many vote on a patch"),
    ("temperature", 0.02, 1e-6, 1e6, "in-context: their weights are softmax(similarity / this)"),
    ("memory", 10_240_000, 1, 10**10, "in-context: patches in the memory, at most"),
    ("block-memory", 256, 1, 10**6, "in-context: working memory of the search in MB"),
    ("epochs", 25, 1, 10**4, "linear: length; the last fifth runs at a tenth of the rate"),
    ("lr", 0.01, 1e-9, 1e6, "linear: learning rate"),
    ("batch-size", 128, 1, 10**5, "linear: images in a step"),
    ("workers", min(8, os.cpu_count() or 1), 0, 1024, "processes that read images; 0 for none"),
    ("seed", 0, 0, 2**32 - 1, "of the memory, the probe and its crops"),
    ("pictures", 0, 0, 100, "validation images to draw, into picture.png"),
)
# Fit for the tiny network and the small images of `python neco.py --demo`.
DEMO = dict(dataset="folder", backbone="tiny", size=112, epochs=10, batch_size=16, pictures=4)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line; InputError names the flag that is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval_seg.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--data", type=Path, help="folder of the data set, as its downloads unpack")
    add("--dataset", choices=DATASETS, default="folder", help="layout of --data (default: folder)")
    add("--method", choices=[*METHODS, "both"], default="both", help="protocol (default: both)")
    add("--backbone", default="dinov2_vits14_reg", help="name in the hub, or tiny")
    add("--hub", help="owner/repo[:ref] or a local folder with a hubconf.py, as in neco.py")
    add("--weights", nargs="+", default=["none"], metavar="W", help="files, or none for the hub's")
    add("--out", type=Path, default=Path("runs/eval"), help="folder for results.json (runs/eval)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--precision", choices=["fp32", "bf16"], help="of the backbone (default: bf16 on cuda)")
    add("--demo", action="store_true", help="evaluate what neco.py --demo left in runs/demo")
    for flag, default, low, high, text in NUMBERS:
        note = f"{text}, {low:g} to {high:g}" + (f" (default: {default})" if default else "")
        add(f"--{flag}", type=type(low), default=default, metavar="N", help=note)

    def error(message: str) -> None:
        raise InputError(message.removeprefix("argument "))

    parser.error = error
    args = parser.parse_args(argv)
    if args.demo:
        root = args.data or Path("runs/demo")
        weights = [str(root / "start.pth"), str(root / "teacher.pth")]
        parser.set_defaults(**DEMO, weights=weights, out=root / "eval")
        args = parser.parse_args(argv)
        args.data = root / "data"
        if not args.data.is_dir():
            raise InputError(f"{args.data} is not there: run `python neco.py --demo` first")
    if args.data is None:
        raise InputError("--data is needed: the folder of the data set (or --demo)")
    for flag, default, low, high, _ in NUMBERS:
        value = getattr(args, flag.replace("-", "_"))
        if value != default and not low <= value <= high:
            raise InputError(f"--{flag} {value} is not from {low:g} to {high:g}")
    try:
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if args.device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {args.device} cannot be used here") from error
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    return args


def load_backbones(name: str, hub: str | None, weights: list[str], seed: int) -> dict:
    """Load the backbone once for each weights: modules by file name, or by path."""
    names = [Path(path).name for path in weights]
    names = names if len(set(names)) == len(names) else weights
    if len(set(names)) < len(names):
        raise InputError(f"--weights holds the same entry twice: {' '.join(weights)}")
    backbones = {}
    for short, path in zip(names, weights, strict=True):
        torch.manual_seed(seed)  # tiny without weights is random
        backbones[short] = load_backbone(name, hub, None if path == "none" else path).eval()
    return backbones


def input_size(asked: int | None, default: int, patch: int) -> int:
    """Side of the input: as asked, or the largest multiple of the patch size up to the default."""
    if asked is not None and asked % patch:
        raise InputError(f"--size {asked} is no multiple of the patch size, {patch}")
    return asked or default // patch * patch


def summary(history: list[Tensor], classes: list[str]) -> dict:
    """Figures of the last confusion matrix, and the mIoU of each, for results.json."""
    iou = (100 * class_iou(history[-1])).tolist()
    iou = [None if math.isnan(value) else value for value in iou]
    return {
        "miou": mean_iou(history[-1]),
        "miou_per_epoch": [mean_iou(confusion) for confusion in history],
        "classes_counted": len(iou) - iou.count(None),
        "iou": dict(zip(classes, iou, strict=True)),
    }


def format_table(title: str, results: dict[str, dict]) -> str:
    """IoU in percent: a row per class, a column per weights with the difference to the first."""
    values = {name: [*result["iou"].values(), result["miou"]] for name, result in results.items()}
    base = next(iter(values))
    columns = [[title, *results[base]["iou"], "mIoU"]]
    for name, column in values.items():
        columns.append([name, *("-" if v is None else f"{v:.2f}" for v in column)])
        if name != base:
            pairs = list(zip(column, values[base], strict=True))
            changes = ("-" if None in pair else f"{pair[0] - pair[1]:+.2f}" for pair in pairs)
            columns.append(["change", *changes])
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in zip(*columns, strict=True)
    ]
    counted = ", ".join(str(result["classes_counted"]) for result in results.values())
    total = len(results[base]["iou"])
    return "\n".join([*rows, f"classes counted (occurring or predicted): {counted} of {total}"])


def run(args: argparse.Namespace) -> None:
    """Evaluate as the command line says: print the figures, write results.json and the picture."""
    backbones = load_backbones(args.backbone, args.hub, args.weights, args.seed)
    patch = next(iter(backbones.values())).patch_size
    methods = list(METHODS) if args.method == "both" else [args.method]
    options = {}
    for method in methods:
        _, size, flags = METHODS[method]
        options[method] = {"size": input_size(args.size, size, patch)}
        options[method] |= {flag: getattr(args, flag) for flag in flags}
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # fail now rather than after hours
    data = DATASETS[args.dataset](args.data)
    # every class has a row of its own in the tables, whatever their names
    names = enumerate(data.classes)
    names = [f"{name} ({n})" if name in data.classes[:n] else name for n, name in names]
    data = data._replace(classes=names)
    if "in-context" in methods and args.memory < len(data.train):
        raise InputError(f"--memory {args.memory} is less than a patch for each training image")
    sources = dict.fromkeys(methods, data)
    if args.dataset.startswith("coco") and "linear" in methods:  # its probe trains on a tenth
        order = np.random.default_rng(args.seed).permutation(len(data.train))
        tenth = sorted(order[: max(1, len(order) // 10)].tolist())
        sources["linear"] = data._replace(train=[data.train[n] for n in tenth])

    settings = {
        "data": f"{args.data} ({args.dataset}), {len(data.classes)} classes",
        "backbone": f"{args.backbone}, patch {patch}, {args.precision} on {args.device}",
        "seed": args.seed,
    }
    for method in methods:
        source = {"train": len(sources[method].train), "val": len(sources[method].val)}
        settings[method] = source | options[method]
    for key, value in settings.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        print(f"{key:12}{value}")

    pictures = min(args.pictures, len(data.val))
    shown = np.linspace(0, len(data.val) - 1, pictures).astype(int).tolist()
    common = {"seed": args.seed, "workers": args.workers, "precision": args.precision}
    results: dict[str, dict] = {method: {} for method in methods}
    predictions, maps = {}, {}
    for name, backbone in backbones.items():
        backbone.to(args.device)
        for method in reversed(methods):  # the picture shows in-context where both are run
            print(f"\n{method}, {name}", flush=True)
            protocol, *_ = METHODS[method]
            history, predictions[name] = protocol(
                backbone, sources[method], **options[method], **common, keep=shown
            )
            results[method][name] = summary(history, data.classes)
        if shown:
            pairs = [data.val[n] for n in shown]
            dataset = ImagesAndMasks(pairs, data.read_mask, options[methods[0]]["size"], PROBE_SIZE)
            batches = patch_features(backbone, dataset, "picture", precision=args.precision)
            maps[name] = torch.cat([features.cpu() for features, _ in batches])
        backbone.cpu()

    for method in methods:
        print("\n" + format_table(method, results[method]))
    content = {"settings": settings, "weights": dict(zip(backbones, args.weights, strict=True))}
    (args.out / "results.json").write_text(json.dumps(content | results, indent=1))
    print(f"\nwritten: {args.out / 'results.json'}")
    if shown:
        make_picture(data, shown, predictions, maps).save(args.out / "picture.png")
        print(f"written: {args.out / 'picture.png'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after a sentence about bad input."""
    try:
        run(parse_arguments(argv))
    except (InputError, OSError) as error:
        # A worker of the DataLoader wraps its traceback around the sentence, which comes last.
        sentence = str(error).split("InputError: ")[-1].strip()
        print(f"eval_seg.py: error: {sentence}", file=sys.stderr)
        traceback.clear_frames(error.__traceback__)  # they hold the loader: its workers end now
        return 2
    except KeyboardInterrupt:
        print("\neval_seg.py: interrupted, nothing is written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
