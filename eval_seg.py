# SPDX-License-Identifier: MIT
"""Are the patch features better after a training? Two kinds of segmentation tell, and pictures.

    python eval_seg.py --demo                        # makes its images, trains and evaluates
    python eval_seg.py --data VOCdevkit/VOC2012 --dataset voc --weights none runs/neco/student.pth
    python eval_seg.py --data coco --dataset coco-things --method linear --weights student.pth
    python eval_seg.py --data streets                # train/ and val/, each with images/ and masks/
    python eval_seg.py --data photos --weights none runs/neco/student.pth    # no masks: a picture

The backbone is frozen, and two protocols measure how much its patch features tell about classes.
In-context: a patch takes the labels of its nearest neighbours among the training patches; nothing
is trained. Linear: one linear layer maps features to classes. On voc, ade20k and coco-* it is
trained as in the literature, for 25 epochs of SGD on random crops. On a folder of your own this may
be too few steps, and the figure would tell how fast the layer learns. So there it is fitted to all
patches by 60 iterations of L-BFGS, which is enough to converge.

Compare figures within a table of this file. Published in-context tables mostly come from the public
evaluator, open-hummingbird-eval, and differ in more than the features:

                           this file                   public evaluator
    memory                 whole training images       random crops with colour jitter
    training pixels
      without label        have no vote                vote as class 0
    classes of ADE20K      150                         151, one of them with an IoU of 0
    predicted classes      count as they are           are renamed to fit the truth (Hungarian)
    deviation of blue      0.225, as in ImageNet       0.255

The public linear probe averages over 151 classes on ADE20K as well.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import (
    center_crop,
    normalize,
    resize,
    resized_crop,
    to_pil_image,
)
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import neco
from neco import InputError

# ----------------------------------------------------------------------------------- data sets
# A data set is a list of items to learn from, a list of items to predict, and the class names. The
# files are expected where their archives unpack to.

IGNORE = 255  # in a mask: a pixel without label
NEAREST = InterpolationMode.NEAREST_EXACT
VOC_CLASSES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog
horse motorbike person pottedplant sheep sofa train tvmonitor"""
Item = tuple[Path, Path, dict[int, int]]  # image, mask, and mask value -> class or IGNORE
DataSet = tuple[list[Item], list[Item], list[str]]
Batches = Iterable[tuple[Tensor, Tensor]]  # features (B, D, h, w), square masks (B, M, M)


def pair(images: Path, masks: Path, names: Iterable[str], values: dict[int, int]) -> list[Item]:
    """The items NAME.jpg and NAME.png."""
    return [(images / f"{name}.jpg", masks / f"{name}.png", values) for name in names]


def names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir() if path.suffix == ".png")


def load_voc(root: Path) -> DataSet:
    """Pascal VOC 2012. Learns from trainaug, with the masks of SBD, where they were added."""
    lists = root / "ImageSets/Segmentation"
    splits = {"trainaug": "SegmentationClassAug", "val": "SegmentationClass"}
    if not (lists / "trainaug.txt").exists() or not (root / "SegmentationClassAug").exists():
        splits = {"train": "SegmentationClass", "val": "SegmentationClass"}
        print(
            "Learning from the 1,464 images of train, not the 10,582 of trainaug. The other masks "
            "come from SBD (Hariharan et al., 2011), shared as SegmentationClassAug.zip: unpack it "
            f"in {root}, and put trainaug.txt into {lists}."
        )
    values = {n: n for n in [*range(21), IGNORE]}
    items = []
    for split, masks in splits.items():
        words = (lists / f"{split}.txt").read_text().split()
        names = dict.fromkeys(Path(word).stem for word in words)  # some lists hold pairs of paths
        items.append(pair(root / "JPEGImages", root / masks, names, values))
    return *items, VOC_CLASSES.split()


def load_ade20k(root: Path) -> DataSet:
    """ADE20K scene parsing: 150 classes, in the masks 1 to 150; 0 is no label."""
    values = {0: IGNORE} | {n + 1: n for n in range(150)}
    items = []
    for split in ("training", "validation"):
        masks = root / "annotations" / split
        items.append(pair(root / "images" / split, masks, names_in(masks), values))
    lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
    return *items, [line.split("\t")[-1].split(",")[0] for line in lines]


def load_coco_things(root: Path) -> DataSet:
    """COCO 2017 panoptic: the 12 super-categories of things; stuff is ignored."""
    splits = []
    for split in ("train2017", "val2017"):
        masks = root / "annotations" / f"panoptic_{split}"
        categories, annotations = read_json(masks.with_suffix(".json"), "categories", "annotations")
        names = {c["id"]: c["supercategory"] for c in categories if c["isthing"]}
        classes = sorted(set(names.values()))
        numbers = {category: classes.index(name) for category, name in names.items()}
        items = []
        for annotation in annotations:
            values = {0: IGNORE}  # of no segment; stuff is ignored below
            for segment in annotation["segments_info"]:
                values[segment["id"]] = numbers.get(segment["category_id"], IGNORE)
            items += pair(root / split, masks, [Path(annotation["file_name"]).stem], values)
        splits.append(items)
    return *splits, classes


def load_coco_stuff(root: Path) -> DataSet:
    """COCO 2017 stuff: its 15 super-categories; things (0) and `other` (183) are ignored."""
    # stuff_train2017.json has the same categories, and 20 times the size
    (categories,) = read_json(root / "annotations/stuff_val2017.json", "categories")
    names = {c["id"]: c["supercategory"] for c in categories}
    classes = sorted(set(names.values()) - {"other"})
    values = {0: IGNORE}
    for value, name in names.items():
        values[value] = classes.index(name) if name in classes else IGNORE
    splits = []
    for split in ("train2017", "val2017"):
        masks = root / "annotations" / f"stuff_{split}_pixelmaps"
        splits.append(pair(root / split, masks, names_in(masks), values))
    return *splits, classes


def read_json(path: Path, *keys: str) -> list:
    """Read some entries of a JSON file; InputError if it is cut off, or lacks one."""
    try:
        content = json.loads(path.read_bytes())
        return [content[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is cut off, or no annotation file of COCO ({error!r})") from error


def load_folder(root: Path) -> DataSet:
    """Images in train/images and val/images, masks in train/masks and val/masks: PNG files of the
    same names and of one channel, in which each value is a class, but 255 no label. Masks are
    stored the way the image is seen, after a turn that its EXIF data may ask for."""
    found = set()
    splits = []
    for split in ("train", "val"):
        images = sorted((root / split / "images").iterdir())
        images = [path for path in images if path.suffix.lower() in neco.IMAGE_TYPES]
        masks = [root / split / "masks" / f"{path.stem}.png" for path in images]
        for mask in progress(masks, "looking for classes"):
            found.update(read_mask(mask, {n: n for n in range(256)}).unique().tolist())
        splits.append(list(zip(images, masks)))
    found = sorted(found - {IGNORE})
    if all(splits) and len(found) < 2:
        raise InputError(f"--data {root}: the masks hold the classes {found}; 255 means no label")
    values = {value: number for number, value in enumerate(found)} | {IGNORE: IGNORE}
    train, val = ([(*files, values) for files in split] for split in splits)
    return train, val, [f"class {value}" for value in found]


COCO = "train2017.zip, val2017.zip, {}_annotations_trainval2017.zip and the archives inside it"
DATASETS = {  # name: the function that lists its items, and the archives that hold its files
    "voc": (load_voc, "VOCtrainval_11-May-2012.tar"),
    "ade20k": (load_ade20k, "ADEChallengeData2016.zip"),
    "coco-things": (load_coco_things, COCO.format("panoptic")),
    "coco-stuff": (load_coco_stuff, COCO.format("stuff")),
    "folder": (load_folder, "train and val, each with images/NAME.* and masks/NAME.png"),
}


def load_dataset(name: str, root: Path) -> DataSet:
    """List a data set; InputError names the first file that is missing, and what it comes with."""
    load, source = DATASETS[name]
    try:
        train, val, classes = load(root)
        for image, mask, _ in progress(train + val, "looking for files"):
            image.stat()
            mask.stat()
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing: --dataset {name} needs {source}") from error
    if not train or not val:
        raise InputError(f"--data {root} has no images to learn from, or none to predict")
    return train, val, classes


def read_mask(path: Path, values: dict[int, int]) -> Tensor:
    """Read a mask as class numbers and IGNORE, (H, W) uint8; InputError for a value of no class."""
    try:
        pixels = np.asarray(Image.open(path)).astype(int)
        if pixels.ndim == 3:  # a panoptic mask of COCO
            pixels = pixels[..., :3] @ [1, 256, 65536]
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{path} cannot be read: {error}") from error
    mask = np.empty(pixels.shape, np.uint8)
    for value in np.unique(pixels).tolist():
        if value not in values:
            raise InputError(f"{path} holds {value}, which is no class (RGB: R + 256 G + 65536 B)")
        mask[pixels == value] = values[value]
    return torch.from_numpy(mask)


def read_photo(path: Path) -> Tensor:
    """Read an image (3, H, W); InputError names what cannot be read."""
    try:
        return neco.read_image(path)
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{path} cannot be read: {error}") from error


def read_batch(items: list[Item], size: int, mask_size: int, crop: bool) -> tuple[Tensor, Tensor]:
    """Read images (B, 3, size, size) and their masks (B, mask_size, mask_size), both uint8.

    They show the whole image, or with `crop` 80 to 100 % of its area (RandomResizedCrop), flipped
    or not, squeezed to a square.
    """
    images, masks = [], []
    for path, mask_path, values in items:
        image = read_photo(path)
        mask = read_mask(mask_path, values)[None]
        if image.shape[1:] != mask.shape[1:]:
            raise InputError(f"{path} and its mask {mask_path} differ in size")
        box = 0, 0, *image.shape[1:]
        if crop:
            box = RandomResizedCrop.get_params(image, (0.8, 1.0), (3 / 4, 4 / 3))
            if torch.rand(()) < 0.5:
                image, mask = image.flip(-1), mask.flip(-1)
        images.append(resized_crop(image, *box, [size, size], antialias=True))
        masks.append(resized_crop(mask, *box, [mask_size, mask_size], NEAREST)[0])
    return torch.stack(images), torch.stack(masks)


# ------------------------------------------------------------------------- features and metric


def progress(items: Iterable, label: str) -> Iterator:
    """Yield the items; on a terminal, show how far it is and the time left in one line."""
    start, total = time.monotonic(), len(items)
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = round((time.monotonic() - start) / done * (total - done))
            line = f"{label}: {done}/{total}, {left // 60}:{left % 60:02} left" * (done < total)
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


@torch.no_grad()
def features_of(backbone, images: Tensor, precision: str = "fp32") -> Tensor:
    """Features (B, D, h, w) float32, on the device of the backbone, of images uint8 (B, 3, S, S).

    The backbone is put into evaluation mode.
    """
    device = next(backbone.parameters()).device
    images = normalize(images.to(device) / 255, neco.MEAN, neco.STD)
    with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        features = backbone.eval()(images).float()
    if not features.isfinite().all():
        raise InputError("--weights give features that are not finite: they are broken")
    return features


def patch_features(backbone, items, size, mask_size, label, args, crop=False) -> Batches:
    """Yield features (B, D, h, w) and masks (B, M, M) of items, on the device of the backbone.

    `read_batch` explains size, mask_size = M and crop; crops come in random order, 128 at a time,
    for SGD. `label` names the work on a terminal. args: `workers` and `precision`.
    """
    collate = partial(read_batch, size=size, mask_size=mask_size, crop=crop)
    batch = 128 if crop else 16
    loader = DataLoader(items, batch, crop, num_workers=args.workers, collate_fn=collate)
    for images, masks in progress(loader, label):
        features = features_of(backbone, images, args.precision)
        yield features, masks.to(features.device)


@torch.no_grad()
def evaluate(predict: Callable, batches: Batches, classes: list[str]) -> dict[str, float]:
    """Return IoU = TP / (TP + FP + FN) in percent for each class that occurs, and their mean.

    It is counted over all images together. Which classes occur depends on the masks alone, so that
    all weights are compared on the same. `predict` turns features into B maps (M, M) of classes.
    """
    confusion = torch.zeros(len(classes) ** 2, dtype=torch.long)
    for features, masks in batches:
        for prediction, mask in zip(predict(features), masks, strict=True):
            labelled = mask != IGNORE
            pairs = mask[labelled].long() * len(classes) + prediction[labelled]
            confusion += pairs.bincount(minlength=len(confusion)).cpu()
    confusion = confusion.view(len(classes), -1).double()  # true classes x predicted classes
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = (100 * hits / (true + predicted - hits)).tolist()
    found = {name: value for name, value, count in zip(classes, iou, true) if count}
    if not found:
        raise InputError("--data: the validation masks hold no labelled pixel")
    return found | {"mIoU": sum(found.values()) / len(found)}


# ---------------------------------------------------------------------------------- in-context
# Segmentation by retrieval, from "Towards in-context scene understanding" (Balazevic et al., 2023).
# The memory holds features of training patches, each with the class frequencies of its pixels.


def patch_labels(masks: Tensor, classes: int, patch: int) -> Tensor:
    """Class frequencies of the labelled pixels of each patch; all zero where there are none.

    Masks (B, S, S) of class numbers or IGNORE -> (B, (S / patch)^2, C), patches row by row.
    """
    shares = [F.avg_pool2d((masks == n).float(), patch).flatten(1) for n in range(classes)]
    shares = torch.stack(shares, dim=-1)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-6)


def choose_patches(labels: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Choose at most `count` labelled patches of an image, so that rare classes are kept.

    From class frequencies (P, C), and random numbers u in 0-1 (P,): the indices of the patches with
    the smallest u * (sum over their classes of the number of patches with that class).
    """
    present = (labels > 0).float()
    score = uniform * (present @ present.sum(0))
    score[present.sum(1) == 0] = torch.inf
    count = min(count, int(score.isfinite().sum()))
    return score.topk(count, largest=False).indices


def collect_patches(
    batches: Batches, images: int, classes: int, memory: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Collect labelled patches, of each of so many `images` at most `memory` / images.

    Batches of features and masks of the image's size -> features (N, D) and class frequencies
    (N, C), in half precision on a GPU. InputError: there is no labelled pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    features, filled = None, 0
    for maps, masks in batches:
        labels = patch_labels(masks, classes, masks.shape[-1] // maps.shape[-1])  # (B, P, C)
        if features is None:  # all memory at once, as joining parts in the end would take it twice
            quota = min(max(1, memory // images), labels.shape[1])
            dtype = torch.half if maps.is_cuda else torch.float
            features = maps.new_empty(images * quota, maps.shape[1], dtype=dtype)
            frequencies = maps.new_empty(images * quota, classes, dtype=dtype)
        for patches, label in zip(maps.flatten(2).mT, labels, strict=True):  # (P, D), (P, C)
            uniform = torch.rand(len(label), generator=generator).to(label.device)
            chosen = choose_patches(label, quota, uniform)
            end = filled + len(chosen)
            features[filled:end] = patches[chosen]
            frequencies[filled:end] = label[chosen]
            filled = end
    if filled == 0:
        raise InputError("--data: the training masks hold no labelled pixel")
    return features[:filled], frequencies[:filled]


def search(queries: Tensor, memory: Tensor, k: int, chunk: int = 2**14) -> tuple[Tensor, Tensor]:
    """Find the k largest dot products of each query with the memory, exactly.

    Queries (Q, D) and memory (N, D), N >= k -> similarities (Q, k), descending, and indices (Q, k)
    into the memory. No more than Q x chunk products are held, however large the memory is.
    """
    best, indices = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0).long()
    for start in range(0, len(memory), chunk):
        products = queries @ memory[start : start + chunk].T
        values, places = products.topk(min(k, products.shape[1]))
        values = torch.cat([best, values], dim=1)
        best, order = values.topk(min(k, values.shape[1]))  # of those so far and of this chunk
        indices = torch.cat([indices, start + places], dim=1).gather(1, order)
    return best, indices


def retrieve(
    features: Tensor, memory: Tensor, frequencies: Tensor, size: int, k=30, temperature=0.02
) -> Iterator[Tensor]:
    """Predict classes by the k nearest neighbours of each patch in the memory.

    Features (B, D, h, w), L2-normalised memory (N, D), class frequencies (N, C) -> for each image
    class numbers (size, size). The vote of a neighbour weighs softmax(similarity / temperature).
    """
    for image in features:
        queries = F.normalize(image.flatten(1).T, dim=1).to(memory.dtype)  # (h * w, D)
        similarities, indices = search(queries, memory, min(k, len(memory)))
        weights = (similarities.float() / temperature).softmax(dim=1)  # (h * w, k)
        votes = torch.einsum("qk,qkc->cq", weights, frequencies[indices].float())
        votes = votes.view(1, -1, *image.shape[1:])  # (1, C, h, w)
        yield F.interpolate(votes, size, mode="bilinear")[0].argmax(0)


def in_context(backbone, train: list[Item], classes: int, size: int, args) -> Callable:
    """Learn from items; return a function from features (B, D, h, w) to B maps (size, size)."""
    batches = patch_features(backbone, train, size, size, "training patches", args)
    patches, frequencies = collect_patches(batches, len(train), classes, args.memory, args.seed)
    F.normalize(patches, dim=1, out=patches)  # in place: it can take gigabytes
    return partial(retrieve, memory=patches, frequencies=frequencies, size=size)


# -------------------------------------------------------------------------------------- linear
# How much one linear layer reads from frozen features, on masks of 100 x 100 pixels.
# The docstring on top says which of the two ways to fit it is for which data sets.

PROBE_SIZE = 100


def train_probe(probe: nn.Module, batches: Batches, steps: int) -> None:
    """Train a probe as in the literature: SGD, at a tenth of the rate after 4/5 of the steps.

    The probe maps features to class scores (B, C, M, M); `steps` is the number of batches.
    """
    optimizer = torch.optim.SGD(probe.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for step, (features, masks) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 if 5 * step < 4 * steps else 0.001
        scores = probe(features)
        loss = F.cross_entropy(scores, masks.long(), ignore_index=IGNORE, reduction="sum")
        optimizer.zero_grad()
        (loss / (masks != IGNORE).sum().clamp(min=1)).backward()
        optimizer.step()


def solve_probe(layer: nn.Conv2d, features: Tensor, frequencies: Tensor, rounds: int = 10) -> None:
    """Fit a 1x1 convolution to all patches: there is no learning rate to choose.

    Features (N, D) and, as soft targets, class frequencies (N, C). A round is at most six
    iterations of L-BFGS, on features of which each dimension has mean 0 and deviation 1.
    """
    std, mean = (part.float() for part in torch.std_mean(features, dim=0))
    std = std.clamp(min=1e-6)  # of a number that never changes
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=6, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        total = 0.0
        for x, target in zip(features.split(2**14), frequencies.split(2**14), strict=True):
            scores = F.linear((x.float() - mean) / std, layer.weight[:, :, 0, 0], layer.bias)
            part = F.cross_entropy(scores, target.float(), reduction="sum") / len(features)
            part.backward()
            total += part.item()
        return total

    for _ in progress(range(rounds), "probe"):
        optimizer.step(loss)
    with torch.no_grad():  # from now on it takes the features as they are
        layer.weight /= std[:, None, None]
        layer.bias -= layer.weight[:, :, 0, 0] @ mean


def linear(backbone, train: list[Item], classes: int, size: int, args) -> Callable:
    """Learn from items; return a function from features (B, D, h, w) to B maps (100, 100)."""
    torch.manual_seed(args.seed)
    layer = nn.Conv2d(backbone.embed_dim, classes, 1, device=args.device)
    # The protocol upsamples the features and then applies the layer. Both steps are linear: in
    # this order the scores are the same, for a fraction of the work.
    probe = nn.Sequential(layer, nn.Upsample(PROBE_SIZE, mode="bilinear"))
    if args.dataset == "folder":
        batches = patch_features(backbone, train, size, size, "training patches", args)
        solve_probe(layer, *collect_patches(batches, len(train), classes, args.memory, args.seed))
    else:
        if args.dataset.startswith("coco"):  # the protocol takes a tenth
            train = [train[n] for n in torch.randperm(len(train))[: -(-len(train) // 10)]]
        read = partial(patch_features, backbone, train, size, PROBE_SIZE, "epoch", args, crop=True)
        epochs = chain.from_iterable(read() for _ in range(args.epochs))
        train_probe(probe, epochs, args.epochs * -(-len(train) // 128))
    return lambda features: probe(features).argmax(1)


PROTOCOLS = {  # name: how it learns, side of its input, side of masks to predict (None: the same)
    "in-context": (in_context, 518, None),
    "linear": (linear, 448, PROBE_SIZE),
}


# ------------------------------------------------------------------------------------ pictures
# A row for an image, a column for each way to look at it.

CELL, GAP, LINE, NAME = 280, 6, 24, 140  # width of an image, gap, line of text, name in the legend


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class: no two of 150 the same, and far apart for consecutive numbers."""
    saturation, value = 90 - number // 4 % 2 * 25, 95 - number % 4 * 15
    return ImageColor.getrgb(f"hsv({number * 99.5 % 360}, {saturation}%, {value}%)")


def feature_colours(maps: Tensor) -> Tensor:
    """Show feature maps (R, D, h, w) by three principal components, as (R, 3, h, w) uint8.

    Each runs from dark to bright between its 1st and 99th percentile over all maps.
    """
    rows = maps.movedim(1, -1).flatten(0, 2).double()
    rows = rows - rows.mean(0)
    components = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    low, high = torch.quantile(components, rows.new_tensor([0.01, 0.99]), dim=0)
    colours = 255 * ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.to(torch.uint8).view(len(maps), *maps.shape[2:], 3).movedim(-1, 1)


def heat(similarity: Tensor, image: Tensor) -> Tensor:
    """Lay a map (h, w) on an image: from 0, black, by red and yellow to 1, white."""
    value = resize(similarity[None], list(image.shape[1:]), antialias=False)
    glow = (3 * value - torch.arange(3.0)[:, None, None]).clamp(0, 1)  # red, then green, then blue
    return (0.3 * image + 0.7 * 255 * glow).to(torch.uint8)


def mark_middle(image: Tensor) -> Tensor:
    middle, radius = CELL // 2, 8
    box = torch.tensor([[middle - radius] * 2 + [middle + radius] * 2])
    return draw_bounding_boxes(image, box, colors="white", width=2)


def similarities(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines to the patch in the middle of each map (R, D, h, w): of its own map and of the next.

    Both are (R, h, w), and run from 0 for the least similar patch of the two maps to 1.
    """
    unit = F.normalize(maps.cpu(), dim=1)
    h, w = unit.shape[2:]
    middle = unit[:, :, h // 2, w // 2]
    both = torch.stack([unit, unit.roll(-1, dims=0)], dim=1)  # (R, 2, D, h, w)
    found = torch.einsum("rd,rkdhw->rkhw", middle, both)
    low = found.amin((1, 2, 3), keepdim=True)
    found = (found - low) / (1 - low).clamp(min=1e-12)
    return found[:, 0], found[:, 1]


def make_sheet(columns: list, titles: list[str], legend: dict) -> Image.Image:
    """Put columns of images (3, 280, 280) below their titles; the legend: names and colours."""
    cells = [cell for row in zip(*columns) for cell in row]
    body = to_pil_image(make_grid(cells, nrow=len(columns), padding=GAP, pad_value=255))
    per_line, top = body.width // NAME, LINE + body.height
    sheet = Image.new("RGB", (body.width, top + LINE * -(-len(legend) // per_line)), "white")
    sheet.paste(body, (0, LINE))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (CELL + GAP), 4), title, "black", font)
    for place, (name, fill) in enumerate(legend.items()):
        x, y = GAP + place % per_line * NAME, top + place // per_line * LINE
        draw.rectangle((x, y + 2, x + 16, y + 18), fill, "black")
        draw.text((x + 24, y), name[:14], "black", font)
    return sheet


def overlay(image: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Paint the classes of a mask (M, M) over an image (3, H, W)."""
    mask = resize(mask[None].byte().cpu(), list(image.shape[1:]), NEAREST)
    areas = mask == torch.arange(classes)[:, None, None]
    return draw_segmentation_masks(image, areas, 0.8, [colour(n) for n in range(classes)])


def picture_of_items(shown, classes, predictions, features) -> Image.Image:
    """Draw items as the network sees them, their masks, and predictions and features of weights.

    For each weights, `predictions` holds a list of maps of class numbers, and `features` the maps
    (R, D, h, w), which are drawn in axes of their own: two networks share none.
    """
    images, masks = read_batch(shown, CELL, CELL, crop=False)
    columns = [images, [overlay(*pair, len(classes)) for pair in zip(images, masks)]]
    titles = ["image", "truth"]
    for number, maps in enumerate(predictions.values(), 1):
        columns.append([overlay(*pair, len(classes)) for pair in zip(images, maps)])
        titles.append(f"prediction of {number}")
    for number, maps in enumerate(features.values(), 1):
        columns.append(resize(feature_colours(maps), [CELL, CELL], NEAREST))
        titles.append(f"features of {number}")
    seen = {n for mask in masks for n in mask.unique().tolist()} - {IGNORE}
    legend = {classes[n]: colour(n) for n in sorted(seen)}
    return make_sheet(columns, titles, legend)


def show_photographs(args, backbones: dict) -> int:
    """Draw what changed in photographs without masks: features, and where a place is found again.

    They are spread over the folder, and cut to the square in their middle.
    """
    files = neco.find_images(args.data)
    count = min(args.pictures, len(files))
    if count == 0:
        raise InputError(f"--data {args.data} holds neither train and val, nor photographs to draw")
    print(
        f"{args.data} holds neither train nor val: drawing {count} of its {len(files)} photographs"
    )
    photos = []
    for n in range(count):
        photo = read_photo(os.fsdecode(files[n * len(files) // count]))
        photos.append(center_crop(photo, min(photo.shape[1:])))
    cells = [resize(photo, [CELL, CELL], antialias=True) for photo in photos]
    columns, titles = [cells], ["photograph"]
    for number, backbone in enumerate(backbones.values(), 1):
        size = backbone.checked_size("--size", args.size, 518)
        images = [resize(photo, [size, size], antialias=True) for photo in photos]
        maps = features_of(backbone.to(args.device), torch.stack(images), args.precision).cpu()
        here, there = similarities(maps)
        columns.append(resize(feature_colours(maps), [CELL, CELL], NEAREST))
        columns.append([mark_middle(heat(*pair)) for pair in zip(here, cells)])
        columns.append([heat(*pair) for pair in zip(there, cells[1:] + cells[:1])])
        titles += [f"features of {number}", f"{number}: like the middle", "the same, in the next"]
    make_sheet(columns, titles, {}).save(args.out / "picture.png")
    print(f"wrote picture.png to {args.out}")
    return 0


# ---------------------------------------------------------------------------------------- demo
# Textures on shapes, in any colour. Its starting weights are taught that colour and the whole image
# matter, which is wrong for these masks, and NeCo has to unlearn it. A run as short as this needs
# large rates, and the teacher, a slow average, lags behind: the student is evaluated.

DEMO = (
    "--backbone tiny --hidden 128 --batch-size 8 --steps 240 --global-size 98 --local-size 42 "
    "--local-crops 2 --grid 5 --queue 2048 --lr 3e-4 --head-lr 1e-3 --workers 0 --log-every 40"
)


def paint(textures: Tensor, hues: Tensor, size: int) -> Tensor:
    """Paint noisy images (n, 3, size, size) in 0-1, each of one texture in two colours.

    Textures (n,) 0 to 3 are stripes, turned by 45 degrees each, 4 and 5 are checks; adding 0.5
    turns them by 22.5 degrees. Hues (n,) are in turns of the colour circle. All else is random.
    """
    n = len(textures)
    textures = textures.view(-1, 1, 1)
    turn, width, *phases = torch.rand(4, n, 1, 1)
    angle = textures % 4 * torch.pi / 4 + 0.3 * (turn - 0.5)
    y, x = torch.arange(size).view(-1, 1), torch.arange(size)
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    waves = torch.stack([along, across]) / (8 + 5 * width) + torch.stack(phases)  # 8 to 13 pixels
    first, second = (2 * torch.pi * waves).sin()
    pattern = torch.where(textures < 4, first, first * second).sign()[:, None]
    tint = (2 * torch.pi * (hues[:, None] + torch.arange(3) / 3)).cos()  # of red, green, blue
    middle = 0.5 + 0.15 * tint + 0.2 * (torch.rand(n, 3) - 0.5)
    contrast = (0.1 + 0.14 * torch.rand(n, 1)) * (0.6 + 0.8 * torch.rand(n, 3))
    images = middle[..., None, None] + contrast[..., None, None] * pattern
    return (images + 0.1 * torch.randn(n, 1, size, size)).clamp(0, 1)


def write_demo_images(folder: Path, size: int = 140) -> None:
    """Write shapes on a ground, and masks: a `folder` data set whose classes are the textures."""
    for split, count in (("train", 200), ("val", 60)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            ground, *shapes = torch.randperm(6)[:4].tolist()
            mask = Image.new("L", (size, size), ground)
            draw = ImageDraw.Draw(mask)
            for label in shapes:
                w, h = torch.randint(50, 88, (2,)).tolist()
                left, top = (torch.rand(2) * (size - torch.tensor([w, h]))).int().tolist()
                shape = draw.rectangle if torch.rand(()) < 0.5 else draw.ellipse
                shape((left, top, left + w, top + h), label)
            classes = torch.from_numpy(np.array(mask)).long().expand(1, 3, -1, -1)
            image = paint(torch.arange(6), torch.rand(6), size).gather(0, classes)[0]
            to_pil_image(image).save(folder / split / "images" / f"{i:03}.png")
            mask.save(folder / split / "masks" / f"{i:03}.png")


def warm_up(steps: int = 130, batch: int = 64) -> nn.Module:
    """Train `tiny` a little, as on ImageNet, on labels of whole images: the texture, one halfway
    between two of the evaluation, and the half of the colour circle."""
    backbone, classifier = neco.load_backbone("tiny"), nn.Linear(64, 12)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in progress(range(steps), "warm-up"):
        textures, halves = torch.randint(6, (batch,)), torch.randint(2, (batch,))
        images = paint(textures + 0.5, (halves + torch.rand(batch)) / 2, size=56)
        features = backbone(normalize(images, neco.MEAN, neco.STD)).mean((2, 3))
        loss = F.cross_entropy(classifier(features), 2 * textures + halves)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return backbone


def demo(out: Path, seed: int) -> int:
    """Make images and a backbone, train it by neco.py, and evaluate it before and after."""
    torch.manual_seed(seed)
    print(f"1. Images, in {out}/data: a class is a texture, colour tells nothing.")
    write_demo_images(out / "data")
    print(f"2. A stand-in for pretraining, on labels of whole images and colours: {out}/start.pth.")
    torch.save(warm_up().model.state_dict(), out / "start.pth")
    flags = f"--data {out}/data/train/images --weights {out}/start.pth --out {out} --seed {seed}"
    print(f"3. NeCo, without labels: python neco.py {flags} {DEMO}")
    neco.main(f"{flags} {DEMO}".split())
    weights = f"{out}/start.pth {out}/student.pth --pictures 3 --out {out}"
    flags = f"--data {out}/data --backbone tiny --size 140 --seed {seed} --weights {weights}"
    print(f"4. Before and after (the teacher still lags behind): python eval_seg.py {flags}")
    return main(flags.split())


# -------------------------------------------------------------------------------- command line
# Sizes, memory and epochs are the protocol's. What both scripts have in common is in neco.py.


def compare(args: argparse.Namespace) -> int:
    """Evaluate all weights: print the figures, write results.json and picture.png."""
    args.out = args.out or Path("runs/demo" if args.demo else "runs/eval")
    if args.demo:
        return demo(args.out, args.seed)
    if args.data is None:
        raise InputError("--data is missing: name the folder of the data set, or try --demo")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "picture.png"):  # of other weights, perhaps
        (args.out / name).unlink(missing_ok=True)
    backbones = {}
    for number, weights in enumerate(dict.fromkeys(args.weights), 1):
        torch.manual_seed(args.seed)  # tiny without weights is random
        file = None if weights == "none" else weights
        backbones[weights] = neco.load_backbone(args.backbone, args.hub, file)
        print(f"{number}: {weights}")
    splits = [args.data / split for split in ("train", "val")]
    if args.dataset == "folder" and args.data.exists() and not any(map(Path.exists, splits)):
        return show_photographs(args, backbones)

    train, val, classes = load_dataset(args.dataset, args.data)
    print(f"{len(classes)} classes, {len(train):,} images to learn from, {len(val):,} to predict")
    count = min(args.pictures, len(val))
    shown = [val[n * len(val) // count] for n in range(count)]
    record = {"settings": vars(args)}
    for method in PROTOCOLS if args.method == "both" else [args.method]:
        learn, default_size, mask_size = PROTOCOLS[method]
        results, predictions, features = {}, {}, {}
        for weights, backbone in backbones.items():
            size = backbone.checked_size("--size", args.size, default_size)
            predict = learn(backbone.to(args.device), train, len(classes), size, args)
            batches = patch_features(backbone, val, size, mask_size or size, method, args)
            results[weights] = evaluate(predict, batches, classes)
            if shown:
                batches = patch_features(backbone, shown, size, size, "pictures", args)
                maps = torch.cat([maps for maps, _ in batches])
                predictions[weights] = [*predict(maps)]
                features[weights] = maps.cpu()
            del predict  # and its memory, before the next is collected
            backbone.cpu()
        record[method] = results
        (args.out / "results.json").write_text(json.dumps(record, indent=1, default=str))
        print_table(f"{method}, {size} px", results)
        if shown:  # of two methods, the first is drawn
            picture = picture_of_items(shown, classes, predictions, features)
            picture.save(args.out / "picture.png")
            shown = []
    print(f"\nwrote results.json{', picture.png' * bool(args.pictures)} to {args.out}")
    return 0


def print_table(title: str, results: dict) -> None:
    """Print IoU by class and weights, with the difference to the first weights."""
    names = [f"{number} {weights[-18:]}" for number, weights in enumerate(results, 1)]
    print(f"\n{title}".ljust(23), *(f"{name:>22}" for name in names))
    for name in next(iter(results.values())):
        row = [scores[name] for scores in results.values()]
        print(f"{name[:22]:22}", *(f"{value:12.2f} ({value - row[0]:+7.2f})" for value in row))
    print("mIoU is the mean over the classes that occur")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status, or raise SystemExit(2) after bad input."""
    parser, add = neco.flags("eval_seg.py --data FOLDER [options]")
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    text = "make images, train, evaluate; takes --out and --seed"
    parser.add_argument("--demo", action="store_true", help=text)
    natural = neco.number(int, 1)
    add("--data", Path, None, "folder of the data set, as its archives unpack, or of photographs")
    add("--dataset", str, "folder", "its layout", choices=DATASETS)
    add("--weights", str, ["none"], "files or URLs; none for those of the hub", nargs="+")
    add("--method", str, "both", "protocol", choices=[*PROTOCOLS, "both"])
    add("--size", natural, None, "side of the input (518 in-context, 448 linear, in whole patches)")
    add("--memory", natural, 10_240_000, "patches kept at most")
    add("--epochs", natural, 25, "of SGD on a probe")
    add(
        "--pictures",
        neco.number(int, 0),
        6,
        "images in picture.png; of two protocols, it shows the first",
    )
    add("--out", Path, None, "folder for the results (runs/eval, runs/demo)")
    return neco.run_command(compare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
