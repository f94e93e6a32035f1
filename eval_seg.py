# SPDX-License-Identifier: MIT
"""Are patch features better after training? Two kinds of segmentation, and pictures, tell.

    python eval_seg.py --demo                        # makes its images, trains and evaluates
    python eval_seg.py --data VOCdevkit/VOC2012 --dataset voc --weights none runs/neco/student.pth
    python eval_seg.py --data streets                # train/ and val/, each with images/ and masks/
    python eval_seg.py --data photos --weights none runs/neco/student.pth    # no masks: a picture

Two protocols measure how much the features of a frozen backbone tell about classes. In-context: a
patch takes the labels of its nearest neighbours among the training patches; nothing is trained.
Linear: one linear layer maps features to classes. On voc, ade20k and coco-* it is trained as in the
literature, by 25 epochs of SGD on random crops. On a folder of your own, where this may be too few
steps, it is fitted to all patches by up to 60 iterations of L-BFGS.

Compare figures within a table of this file. Published in-context tables mostly come from the public
evaluator, open-hummingbird-eval, and differ in more than the features:
                           this file                   public evaluator
    memory                 whole training images       random crops with colour jitter
    pixels without label   have no vote                vote as class 0
    classes of ADE20K      150                         151, one with an IoU of 0 (linear as well)
    predicted classes      count as they are           are renamed to fit the truth (Hungarian)
    deviation of blue      0.225, as in ImageNet       0.255
"""

import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import normalize, resize, resized_crop, to_pil_image

import neco
from neco import InputError

# ----------------------------------------------------------------------------------- data sets
# A data set is a list of items to learn from, one of items to predict, and the class names. An item
# is the path of an image, that of its mask, and a dict from values of the mask to class or IGNORE.

IGNORE = 255  # in a mask: a pixel without label
NEAREST = InterpolationMode.NEAREST_EXACT
VOC_CLASSES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog
horse motorbike person pottedplant sheep sofa train tvmonitor"""


@contextmanager
def reading(path):
    """Say in one sentence which file cannot be read, and why."""
    try:
        yield
    except FileNotFoundError:
        raise  # load_dataset says where it should have come from
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{path} cannot be read: {error!r}") from error


def pair(images, masks, values):
    """All images of a folder, with the PNG files of the same names in a folder of masks."""
    images = sorted(images.glob("[!.]*"))  # no hidden files
    return [(image, masks / f"{image.stem}.png", values) for image in images]


def load_voc(root):
    """Pascal VOC 2012. Learns from trainaug, with the masks of SBD, if they were added."""
    lists = root / "ImageSets/Segmentation"
    splits = [("train", "SegmentationClass"), ("val", "SegmentationClass")]
    if (lists / "trainaug.txt").exists():
        splits[0] = "trainaug", "SegmentationClassAug"
    else:
        print("Learning from the 1,464 images of train. For trainaug (10,582, with masks by SBD),")
        print(f"unpack SegmentationClassAug.zip in {root}, and put trainaug.txt into {lists}.")
    values = {n: n for n in [*range(21), IGNORE]}
    items = []
    for split, masks in splits:
        words = (lists / f"{split}.txt").read_text().split()
        names = dict.fromkeys(Path(word).stem for word in words)  # some lists hold pairs of paths
        images = root / "JPEGImages"
        items.append([(images / f"{n}.jpg", root / masks / f"{n}.png", values) for n in names])
    return *items, VOC_CLASSES.split()


def load_ade20k(root):
    """ADE20K scene parsing: 150 classes, in the masks 1 to 150; 0 is no label."""
    values = dict(enumerate([IGNORE, *range(150)]))
    train = pair(root / "images/training", root / "annotations/training", values)
    val = pair(root / "images/validation", root / "annotations/validation", values)
    rows = (root / "objectInfo150.txt").read_text().splitlines()[1:]
    names = [row.split("\t")[-1].split(",")[0] for row in rows]
    return train, val, names


def number_classes(categories):
    """Map the category ids of a COCO file to class numbers; return also the class names."""
    classes = sorted({c["supercategory"] for c in categories})
    return {c["id"]: classes.index(c["supercategory"]) for c in categories}, classes


def load_coco_things(root):
    """COCO 2017 panoptic: the 12 super-categories of things; stuff is ignored."""
    splits = []
    for split in ("train2017", "val2017"):
        file = root / f"annotations/panoptic_{split}.json"
        items = []
        with reading(file):
            content = json.loads(file.read_bytes())
            numbers, classes = number_classes([c for c in content["categories"] if c["isthing"]])
            for annotation in content["annotations"]:
                mask = file.with_suffix("") / annotation["file_name"]
                values = {0: IGNORE}  # in no segment
                for segment in annotation["segments_info"]:
                    values[segment["id"]] = numbers.get(segment["category_id"], IGNORE)
                items.append((root / split / f"{mask.stem}.jpg", mask, values))
        splits.append(items)
    return *splits, classes


def load_coco_stuff(root):
    """COCO 2017 stuff: its 15 super-categories; things (0) and `other` (183) are ignored."""
    masks = root / "annotations"
    file = masks / "stuff_val2017.json"  # that of train is larger, with the same categories
    with reading(file):
        categories = json.loads(file.read_bytes())["categories"]
        numbers, classes = number_classes([c for c in categories if c["id"] != 183])
    values = {0: IGNORE, 183: IGNORE} | numbers
    train = pair(root / "train2017", masks / "stuff_train2017_pixelmaps", values)
    val = pair(root / "val2017", masks / "stuff_val2017_pixelmaps", values)
    return train, val, classes


def load_folder(root):
    """Images in train/images and val/images; in train/masks and val/masks PNG files of their names,
    with a class in each pixel or 255 for no label, turned as the image's EXIF data says."""
    values = {IGNORE: IGNORE}  # shared by all items, and filled in below
    train = pair(root / "train/images", root / "train/masks", values)
    val = pair(root / "val/images", root / "val/masks", values)
    found = {IGNORE}
    for _, mask, _ in progress(train + val, "looking for classes"):
        found.update(read_mask(mask, {n: n for n in range(256)}).unique().tolist())
    classes = sorted(found)[:-1]  # IGNORE is the largest
    values.update(zip(classes, range(IGNORE)))
    return train, val, [f"class {value}" for value in classes]


DATASETS = {  # name: the function that lists its items, and what holds its files
    "voc": (load_voc, "VOCtrainval_11-May-2012.tar"),
    "ade20k": (load_ade20k, "ADEChallengeData2016.zip"),
    "coco-things": (load_coco_things, "{train,val}2017.zip, panoptic_annotations_trainval2017.zip"),
    "coco-stuff": (load_coco_stuff, "{train,val}2017.zip, stuff_annotations_trainval2017.zip"),
    "folder": (load_folder, "train and val, each with images/NAME.* and masks/NAME.png"),
}


def load_dataset(name, root):
    """List the items to learn from, those to predict, and the class names; say what is missing."""
    load, source = DATASETS[name]
    try:
        train, val, classes = load(root)
        for image, mask, _ in train + val:
            image.stat()
            mask.stat()
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing: --dataset {name} needs {source}") from error
    if not train or not val:
        raise InputError(f"{root} has no images to learn from, or none to predict: give {source}")
    if len(classes) < 2:
        raise InputError(f"{root}: the masks hold the classes {classes}; 255 means no label")
    return train, val, classes


def read_mask(path, values):
    """Read a mask as class numbers and IGNORE, (H, W) uint8; InputError for a value of no class."""
    with reading(path):
        pixels = np.asarray(Image.open(path)).astype(int)
        if pixels.ndim == 3:  # a panoptic mask of COCO
            pixels = pixels[..., :3] @ [1, 256, 65536]
    mask = np.empty(pixels.shape, np.uint8)
    for value in np.unique(pixels).tolist():
        if value not in values:
            raise InputError(f"{path} holds {value}, which is no class (RGB: R + 256 G + 65536 B)")
        mask[pixels == value] = values[value]
    return torch.from_numpy(mask)


def read_batch(items, size, mask_size, crop=False):
    """Read images (B, 3, size, size) and their masks (B, mask_size, mask_size), both uint8.
    They show the whole image, or with `crop` 80 to 100 % of its area (RandomResizedCrop), flipped
    or not, squeezed to a square."""
    images, masks = [], []
    for path, mask_path, values in items:
        with reading(path):
            image = neco.read_image(path)
        mask = read_mask(mask_path, values)[None]
        if image.shape[1:] != mask.shape[1:]:
            raise InputError(f"{path} and its mask {mask_path} differ in size")
        box = 0, 0, *image.shape[1:]  # top, left, height, width
        if crop:
            box = RandomResizedCrop.get_params(image, (0.8, 1.0), (3 / 4, 4 / 3))
            if torch.rand(()) < 0.5:
                image = image.flip(-1)
                mask = mask.flip(-1)
        images.append(resized_crop(image, *box, [size, size]))
        masks.append(resized_crop(mask, *box, [mask_size, mask_size], NEAREST)[0])
    return torch.stack(images), torch.stack(masks)


# ------------------------------------------------------------------------- features and metric
# Everything below reads a data set as batches: features (B, D, h, w) and masks (B, M, M).


def progress(items, label):
    """Yield the items; on a terminal, count them in one line."""
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            print(f"\033[K{label}: {done:,} of {len(items):,}", end="\r", file=sys.stderr)


@torch.no_grad()
def features_of(backbone, images, precision="fp32"):
    """Features (B, D, h, w) float32, on the backbone's device, of images uint8 (B, 3, S, S)."""
    device = next(backbone.parameters()).device
    images = normalize(images.to(device) / 255, neco.MEAN, neco.STD)
    with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        features = backbone.eval()(images).float()
    if not features.isfinite().all():
        raise InputError("--weights give features that are not finite")
    return features


def patch_features(backbone, items, size, mask_size, label, args, crop=False):
    """Yield features (B, D, h, w) and masks (B, M, M) of items; crops come in random order."""
    collate = partial(read_batch, size=size, mask_size=mask_size, crop=crop)
    batch = 128 if crop else 16
    loader = DataLoader(items, batch, crop, num_workers=args.workers, collate_fn=collate)
    for images, masks in progress(loader, label):
        features = features_of(backbone, images, args.precision)
        yield features, masks.to(features.device)


@torch.no_grad()
def evaluate(predict, batches, classes):
    """Return IoU = TP / (TP + FP + FN) in percent for each class that occurs, and their mean.
    Counted over all images together; which classes occur depends on the masks alone. `predict`
    turns features into class numbers (B, M, M). InputError: there is no labelled pixel."""
    count = len(classes)
    confusion = torch.zeros(count**2, dtype=torch.long)
    for features, masks in batches:
        labelled = masks != IGNORE
        pairs = count * masks[labelled].long() + predict(features)[labelled]
        confusion += pairs.bincount(minlength=count**2).cpu()
    confusion = confusion.view(count, count).double()  # true classes x predicted classes
    hits = confusion.diagonal()
    true = confusion.sum(1)
    iou = 100 * hits / (true + confusion.sum(0) - hits)
    found = {classes[n]: iou[n].item() for n in true.nonzero().flatten()}
    if not found:
        raise InputError("--data: the validation masks hold no labelled pixel")
    return found | {"mIoU": sum(found.values()) / len(found)}


# ---------------------------------------------------------------------------------- in-context
# Segmentation by retrieval, from "Towards in-context scene understanding" (Balazevic et al., 2023).
# The memory holds features of training patches, each with the class frequencies of its pixels.


def patch_labels(masks, classes, patch):
    """Class frequencies of the labelled pixels of each patch; all zero where there are none.
    Masks (B, S, S) of class numbers or IGNORE -> (B, (S / patch)^2, C), patches row by row."""
    shares = [F.avg_pool2d((masks == n).float(), patch).flatten(1) for n in range(classes)]
    shares = torch.stack(shares, dim=-1)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-6)


def choose_patches(labels, count, uniform):
    """Choose at most `count` labelled patches of an image: those with the smallest u * (sum over
    their classes of the number of patches with that class), so that rare classes are kept.
    From class frequencies (P, C) and random numbers u in 0-1 (P,) to indices."""
    present = (labels > 0).float()
    score = uniform * (present @ present.sum(0))
    score[present.sum(1) == 0] = torch.inf
    count = min(count, int(score.isfinite().sum()))
    return score.topk(count, largest=False).indices


def collect_patches(batches, images, classes, memory, seed=0):
    """Collect labelled patches, of each image at most memory / images (but one at least).
    Batches of features and masks of the image's size -> features (N, D) and class frequencies
    (N, C), in half precision on a GPU. InputError: there is no labelled pixel."""
    generator = torch.Generator().manual_seed(seed)
    filled = 0
    for maps, masks in batches:
        labels = patch_labels(masks, classes, masks.shape[-1] // maps.shape[-1])  # (B, P, C)
        if filled == 0:  # all memory at once, as joining parts in the end would take it twice
            quota = min(max(1, memory // images), labels.shape[1])
            dtype = torch.half if maps.is_cuda else torch.float
            features = maps.new_empty(images * quota, maps.shape[1], dtype=dtype)
            frequencies = maps.new_empty(images * quota, classes, dtype=dtype)
        for patches, label in zip(maps.flatten(2).mT, labels):  # (P, D), (P, C)
            uniform = torch.rand(len(label), generator=generator).to(label.device)
            chosen = choose_patches(label, quota, uniform)
            end = filled + len(chosen)
            features[filled:end] = patches[chosen]
            frequencies[filled:end] = label[chosen]
            filled = end
    if filled == 0:
        raise InputError("--data: the training masks hold no labelled pixel")
    return features[:filled], frequencies[:filled]


def training_patches(backbone, train, classes, size, args):
    """Features (N, D) and class frequencies (N, C) of the patches of items, at most --memory."""
    batches = patch_features(backbone, train, size, size, "training patches", args)
    return collect_patches(batches, len(train), classes, args.memory, args.seed)


def search(queries, memory, k, chunk=2**14):
    """Find the k largest dot products of each query with the memory, exactly.
    Queries (Q, D) and memory (N, D), N >= k -> similarities (Q, k), descending, and indices (Q, k)
    into the memory. No more than Q x chunk products are held, however large the memory is."""
    best = queries.new_empty(len(queries), 0)
    indices = best.long()
    for number, part in enumerate(memory.split(chunk)):
        products = queries @ part.T
        values, places = products.topk(min(k, products.shape[1]))
        values = torch.cat([best, values], dim=1)
        best, order = values.topk(min(k, values.shape[1]))  # of those so far and of this chunk
        indices = torch.cat([indices, number * chunk + places], dim=1).gather(1, order)
    return best, indices


def retrieve(features, memory, frequencies, size, k=30, temperature=0.02):
    """Predict classes by the k nearest neighbours of each patch in the memory.
    Features (B, D, h, w), L2-normalised memory (N, D), class frequencies (N, C) -> class numbers
    (B, size, size). The vote of a neighbour weighs softmax(similarity / temperature)."""
    predictions = []
    for image in features:
        queries = F.normalize(image.flatten(1).T, dim=1).to(memory.dtype)  # (h * w, D)
        similarities, indices = search(queries, memory, min(k, len(memory)))
        weights = (similarities.float() / temperature).softmax(dim=1)  # (h * w, k)
        votes = torch.einsum("qk,qkc->cq", weights, frequencies[indices].float())
        votes = votes.view(1, -1, *image.shape[1:])  # (1, C, h, w)
        predictions.append(F.interpolate(votes, size, mode="bilinear")[0].argmax(0))
    return torch.stack(predictions)


def in_context(backbone, train, classes, size, args):
    """Learn from items; return a function from features to class numbers (B, size, size)."""
    patches, frequencies = training_patches(backbone, train, classes, size, args)
    F.normalize(patches, dim=1, out=patches)  # in place: it can take gigabytes
    return partial(retrieve, memory=patches, frequencies=frequencies, size=size)


# -------------------------------------------------------------------------------------- linear
# How much one linear layer reads from frozen features, on masks of 100 x 100 pixels.


def train_probe(probe, batches, steps):
    """Train a probe as in the literature: SGD, at a tenth of the rate after 4/5 of the steps.
    The probe maps features to class scores (B, C, M, M); `steps` is the number of batches."""
    optimizer = torch.optim.SGD(probe.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for step, (features, masks) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 if 5 * step < 4 * steps else 0.001
        loss = F.cross_entropy(probe(features), masks.long(), ignore_index=IGNORE, reduction="sum")
        loss = loss / (masks != IGNORE).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def solve_probe(layer, features, frequencies):
    """Fit a 1x1 convolution to features (N, D) and, as soft targets, class frequencies (N, C), by
    at most 60 iterations of L-BFGS, on features standardised to mean 0 and deviation 1."""
    std, mean = torch.std_mean(features, dim=0)
    std = std.clamp(min=1e-6)  # of a constant dimension
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=6, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = 0.0
        for x, target in zip(features.split(2**14), frequencies.split(2**14)):
            scores = F.linear((x.float() - mean) / std, layer.weight.flatten(1), layer.bias)
            part = F.cross_entropy(scores, target.float(), reduction="sum") / len(features)
            part.backward()
            total += part.item()
        return total

    for _ in range(10):
        optimizer.step(loss)
    with torch.no_grad():  # from now on it takes the features as they are
        layer.weight /= std[:, None, None]
        layer.bias -= layer.weight.flatten(1) @ mean.float()  # half precision on a GPU


def linear(backbone, train, classes, size, args):
    """Learn from items; return a function from features to class numbers (B, 100, 100)."""
    torch.manual_seed(args.seed)
    layer = nn.Conv2d(backbone.embed_dim, classes, 1, device=args.device)
    # The protocol upsamples first. Both steps are linear: the scores are the same, for less work.
    probe = nn.Sequential(layer, nn.Upsample(100, mode="bilinear"))
    if args.dataset == "folder":
        solve_probe(layer, *training_patches(backbone, train, classes, size, args))
    else:
        if args.dataset.startswith("coco"):  # the protocol takes a tenth
            train = [train[n] for n in torch.randperm(len(train))[::10]]
        epoch = partial(patch_features, backbone, train, size, 100, "epoch", args, crop=True)
        batches = (batch for _ in range(args.epochs) for batch in epoch())
        train_probe(probe, batches, args.epochs * -(-len(train) // 128))
    return lambda features: probe(features).argmax(1)


PROTOCOLS = {  # name: how it learns, side of its input, side of masks to predict (None: the same)
    "in-context": (in_context, 518, None),
    "linear": (linear, 448, 100),
}


# ------------------------------------------------------------------------------------ pictures
# A row for each image, a column for each way to look at it. Two networks share no axes: the
# features of each are drawn in axes of their own.

CELL, STEP, LINE = 294, 300, 12  # side of an image, the same with a gap, height of a line of text
# Red, green and blue of each class: no two of 150 the same, consecutive ones far apart.
PALETTE = 55 + torch.arange(1, 257)[:, None] * torch.tensor([117, 173, 49]) % 200
PALETTE[IGNORE] = 0
enlarge = partial(resize, size=[CELL, CELL], interpolation=NEAREST)  # (R, 3, h, w), as tiles


def feature_colours(maps):
    """Show feature maps (R, D, h, w) by three principal components, as (R, 3, h, w) in 0-255.
    Each runs from dark to bright between its 1st and 99th percentile over all maps."""
    rows = maps.movedim(1, -1).flatten(0, 2)  # (R * h * w, D)
    axes = torch.pca_lowrank(rows, q=3, niter=9)[2]  # (D, 3)
    components = rows @ axes
    low, high = components.quantile(torch.tensor([0.01, 0.99]), dim=0)
    shares = (components - low) / (high - low).clamp(min=1e-12)
    colours = 255 * shares.clamp(0, 1)
    return colours.unflatten(0, maps[:, 0].shape).movedim(-1, 1)


def similarities(maps):
    """Cosines of the middle patch of each map (R, D, h, w) to all patches of it and of the next:
    (2, R, h, w), rescaled to 0 for the least similar patch of the two maps and 1 for equal."""
    h, w = maps.shape[2:]
    middle = maps[:, :, h // 2, w // 2, None, None]  # (R, D, 1, 1)
    both = torch.stack([maps, maps.roll(-1, 0)])  # (2, R, D, h, w)
    found = F.cosine_similarity(both, middle, dim=2)
    low = found.amin((0, 2, 3), keepdim=True)
    return (found - low) / (1 - low).clamp(min=1e-12)


def heat(similarity):
    """Colours (R, 3, h, w) in 0-255 of maps (R, h, w): 0 is black, then red and yellow, 1 white."""
    glow = 3 * similarity[:, None] - torch.arange(3).view(3, 1, 1)  # red, then green, then blue
    return 255 * glow.clamp(0, 1)


def make_sheet(columns, classes):
    """Join columns, a dict from title to R images (3, CELL, CELL), and name the class colours."""
    sheet = Image.new("RGB", (STEP * len(columns) + STEP // 2, STEP * len(columns["image"]) + LINE))
    draw = ImageDraw.Draw(sheet)
    left = 0
    for title, images in columns.items():
        draw.text((left, 0), title)
        for row, image in enumerate(images.byte()):
            sheet.paste(to_pil_image(image), (left, STEP * row + LINE))
        left += STEP
    for row, (name, fill) in enumerate(zip(classes, PALETTE.tolist())):
        draw.text((left, LINE * row), name, tuple(fill))
    return sheet


def draw_picture(images, masks, classes, backbones, args):
    """Draw images, masks, features, and where the patch in the middle of an image is found again.
    Images (R, 3, S, S) uint8; `masks` is a dict from title to (R, M, M), empty for photographs."""
    cells = resize(images, [CELL, CELL])
    dark = 0.3 * cells
    columns = {"image": cells}
    for title, numbers in masks.items():
        columns[title] = enlarge(PALETTE[numbers.long()].movedim(-1, 1))
    for number, backbone in enumerate(backbones, 1):
        maps = features_of(backbone, images, args.precision).cpu()
        here, there = map(heat, similarities(maps))
        middle = here.shape[-1] // 2
        here[:, :, middle, middle] = torch.tensor([0.0, 0, 255])  # mark it in blue
        columns[f"features of {number}"] = enlarge(feature_colours(maps))
        columns[f"{number}: like the blue patch"] = dark + 0.7 * enlarge(here)
        columns[f"{number}: the same, in the next"] = dark.roll(-1, 0) + 0.7 * enlarge(there)
    make_sheet(columns, classes).save(args.out / "picture.png")


# ---------------------------------------------------------------------------------------- demo
# Textures in any colour. The starting weights were taught that colour matters; NeCo unlearns it.

DEMO = (
    "--backbone tiny --hidden 128 --batch-size 8 --steps 240 --global-size 98 --local-size 42 "
    "--local-crops 2 --grid 5 --queue 2048 --lr 3e-4 --head-lr 1e-3 --workers 0 --log-every 40"
)


def paint(textures, hues):
    """Paint noisy images (n, 3, H, W) in 0-1 from maps (n, H, W) of textures t (stripes if t < 4,
    else checks, turned by 45 t degrees) and of hues (in turns of the colour circle)."""
    n, h, w = textures.shape
    turn, width = torch.rand(2, n, 1, 1)
    angle = torch.pi / 4 * textures + 0.3 * (turn - 0.5)
    y, x = torch.arange(h)[:, None], torch.arange(w)
    turned = (x + 1j * y) * (-1j * angle).exp()  # as complex numbers, turned back by the angle
    waves = 2 * torch.pi * turned / (8 + 5 * width)  # of 8 to 13 pixels
    stripes = waves.real.sin()
    pattern = torch.where(textures < 4, stripes, stripes * waves.imag.sin()).sign()
    circle = hues[:, None] + torch.arange(3).view(3, 1, 1) / 3  # red, green, blue
    tint = 0.15 * (2 * torch.pi * circle).cos()
    light, contrast = torch.rand(2, n, 3, 1, 1)
    images = 0.4 + 0.2 * light + tint + (0.05 + 0.2 * contrast) * pattern[:, None]
    return (images + 0.1 * torch.randn(n, 1, h, w)).clamp(0, 1)


def write_demo_images(folder, count):
    """Write images of four textures that meet at a point, and their masks."""
    os.makedirs(folder / "images", exist_ok=True)
    os.makedirs(folder / "masks", exist_ok=True)
    for number in range(count):
        y, x = torch.randint(40, 100, (2,))
        below = torch.arange(140)[:, None] > y
        quarter = 2 * below + (torch.arange(140) > x)  # 0 to 3, (140, 140)
        mask = torch.randperm(6)[quarter]
        image = paint(mask[None], torch.rand(4)[quarter][None])[0]
        to_pil_image(image).save(folder / f"images/{number}.png")
        to_pil_image(mask.byte()).save(folder / f"masks/{number}.png")


def warm_up():
    """Train `tiny` a little on whole images: 6 textures between those above, 2 halves of hues."""
    backbone = neco.load_backbone("tiny")
    classifier = nn.Linear(64, 12)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()])
    for _ in range(130):
        labels = torch.randint(12, (64, 1, 1))
        hues = (labels % 2 + torch.rand(64, 1, 1)) / 2
        textures = labels // 2 + 0.5
        images = paint(textures.expand(64, 56, 56), hues)
        features = backbone(normalize(images, neco.MEAN, neco.STD)).mean((2, 3))
        loss = F.cross_entropy(classifier(features), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone


def demo(out, seed):
    """Make images and a backbone, train it by neco.py, and evaluate it before and after."""
    torch.manual_seed(seed)
    print(f"1. Images, in {out}/data: a class is a texture, colour tells nothing.")
    write_demo_images(out / "data/train", 200)
    write_demo_images(out / "data/val", 60)
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
# Default sizes, memory and epochs are the protocols'. Flags of both scripts are in neco.py.


def spread(items, count):
    """At most so many of the items, from all over the list."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]


def compare_figures(backbones, args):
    """Evaluate all weights on a data set: the tables, results.json and picture.png."""
    train, val, classes = load_dataset(args.dataset, args.data)
    print(f"{len(classes)} classes, {len(train):,} images to learn from, {len(val):,} to predict")
    shown = spread(val, args.pictures)
    record = {"settings": vars(args)}
    for method in PROTOCOLS if args.method == "both" else [args.method]:
        learn, default_size, mask_size = PROTOCOLS[method]
        size = args.size or default_size
        size -= size % backbones[0].patch_size  # whole patches
        results, masks = {}, {}
        for weights, backbone in zip(args.weights, backbones):
            predict = learn(backbone, train, len(classes), size, args)
            batches = patch_features(backbone, val, size, mask_size or size, method, args)
            results[weights] = evaluate(predict, batches, classes)
            if shown:
                images, masks["truth"] = read_batch(shown, size, size)
                features = features_of(backbone, images, args.precision)
                masks[f"prediction of {len(results)}"] = predict(features).cpu()
            del predict  # and its memory, before the next is collected
        print_table(f"{method}, {size} px", results)
        record[method] = results
        (args.out / "results.json").write_text(json.dumps(record, indent=1, default=str))
        if shown:
            draw_picture(images, masks, classes, backbones, args)
            shown = []  # of two protocols, the first is drawn


def compare_photographs(backbones, args):
    """Write picture.png, of photographs without masks, squeezed to squares."""
    files = neco.find_images(args.data)
    shown = spread(files, args.pictures)
    if not shown:
        raise InputError(f"--data {args.data} holds neither train and val, nor photographs to draw")
    print(f"neither train nor val in {args.data}: drawing {len(shown)} of {len(files)} photographs")
    size = args.size or 518
    size -= size % backbones[0].patch_size  # whole patches
    images = []
    for file in shown:
        with reading(file):
            image = neco.read_image(file)
        images.append(resize(image, [size, size]))
    draw_picture(torch.stack(images), {}, [], backbones, args)


def compare(args):
    """Compare all weights by figures, or on photographs by a picture alone; or run the demo."""
    args.out = args.out or Path("runs/demo" if args.demo else "runs/eval")
    if args.demo:
        return demo(args.out, args.seed)
    if args.data is None:
        raise InputError("--data is missing: name the folder of the data set, or try --demo")
    os.makedirs(args.out, exist_ok=True)
    backbones = []
    for number, weights in enumerate(args.weights, 1):
        print(f"{number}: {weights}")
        torch.manual_seed(args.seed)  # tiny without weights is random
        file = None if weights == "none" else weights
        backbones.append(neco.load_backbone(args.backbone, args.hub, file).to(args.device))
    for name in ("results.json", "picture.png"):  # of other weights, perhaps
        (args.out / name).unlink(missing_ok=True)
    if args.dataset == "folder" and not {"train", "val"} & set(os.listdir(args.data)):
        compare_photographs(backbones, args)
    else:
        compare_figures(backbones, args)
    print(f"\nThe results are in {args.out}")
    return 0


def print_table(title, results):
    """Print IoU by class and weights, with the difference to the first weights."""
    names = [f"{number} {weights[-18:]}" for number, weights in enumerate(results, 1)]
    print(f"\n{title:22}", *(f"{name:>22}" for name in names))
    for name in next(iter(results.values())):
        row = [scores[name] for scores in results.values()]
        print(f"{name[:22]:22}", *(f"{value:12.2f} ({value - row[0]:+7.2f})" for value in row))


def main(argv=None):
    """Run the command line; return the exit status, or raise SystemExit(2) after bad input."""
    parser, add = neco.flags("eval_seg.py")
    add("--data", Path, None, "folder of the data set, as its archives unpack, or of photographs")
    add("--dataset", str, "folder", "its layout", choices=DATASETS)
    add("--weights", str, ["none"], "files or URLs; none for those of the hub", nargs="+")
    add("--method", str, "both", "protocol", choices=[*PROTOCOLS, "both"])
    add("--size", neco.number(int, 16), None, "side in pixels (518 in-context, 448 linear)")
    add("--memory", neco.number(int, 1), 10_240_000, "patches kept at most")
    add("--epochs", neco.number(int, 1), 25, "of SGD; not on folder")
    add("--pictures", neco.number(int, 0), 6, "images in picture.png, of the first protocol")
    add("--out", Path, None, "folder for the results (runs/eval, runs/demo)")
    parser.add_argument("--demo", action="store_true", help="make images, train and evaluate")
    return neco.run_command(compare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
