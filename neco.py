# SPDX-License-Identifier: MIT
"""NeCo (Patch Neighbor Consistency, arXiv 2408.11054, ICLR 2025) in one file.

NeCo post-trains a pretrained vision transformer on unlabelled images, so that its patch features
serve dense tasks better. A student and a teacher, which is the student's slow average, see
different crops of one image. Take one patch from each crop, both of the same place, and compare the
two with the same reference patches, drawn at random from a queue of teacher patches. The student
learns to rank these references by similarity as the teacher does: who the neighbours of a patch
are, in their whole order, should not depend on crop and colour. A differentiable sorting network
turns similarities into a ranking: the probability of each reference to take each rank.

The loss is the cross-entropy of the student's ranking under the teacher's. It cannot fall below the
entropy of the teacher's ranking, its floor. Nothing in the loss forbids that all similarities
become equal: then rankings are nearly uniform, the floor is near log R for R references, and the
loss above it is 0. Small steps, a slow teacher and a steeper sort for the teacher counteract this
collapse. A small loss above the floor is therefore no success by itself: the floor must stay low.

    python neco.py --data coco/train2017                              # the paper's recipe
    python neco.py --data photos --steps 2000 --batch-size 16         # a shorter run
    torchrun --nproc-per-node 4 neco.py --data coco/train2017         # on four GPUs

The file reads as the paper does: backbone, sorting, loss, views, training. To copy the sort, take
`sorting_network` and `soft_sort`; for the loss also `cosine_similarity`, `neco_loss` and
`RankingLoss`, with the imports functools, math, torch, Tensor and F; for the views, their section.
"""

import argparse
import contextlib
import copy
import functools
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from PIL.ImageFilter import GaussianBlur
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from torchvision.transforms import v2


class InputError(ValueError):
    """Something the user can put right, said in one sentence."""


# ------------------------------------------------------------------------------------ backbone
# Any vision transformer of torch.hub that gives its patch tokens after the final norm, as DINO,
# DINOv2 and DINOv3 do. Class and register tokens are left out: NeCo works on patches alone.

HUBS = {  # by how a backbone's name begins: its hub, and more arguments of its entry points
    "dinov2": ("facebookresearch/dinov2", {"drop_path_rate": 0.1}),
    # DINOv3 needs `pip install torchmetrics termcolor`. Its weights come on request only: give them
    # by --weights. It offers no drop path. In training mode it rescales its positions at random:
    # so the student does, and the teacher does not, as in DINOv3's own pretraining.
    "dinov3": ("facebookresearch/dinov3", {}),
    "dino": ("facebookresearch/dino:main", {"drop_path_rate": 0.1}),
}


class TinyViT(nn.Module):
    """A small vision transformer for trials: DINOv2's patch size and interface, random weights."""

    patch_size = 14
    embed_dim = 64

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(  # two layers learn textures sooner than one
            nn.Conv2d(3, 24, kernel_size=5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(24, 64, kernel_size=7, stride=7),
        )
        options = {"activation": "gelu", "norm_first": True, "batch_first": True}
        blocks = [nn.TransformerEncoderLayer(64, 2, 256, 0.0, **options) for _ in range(3)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(64)

    def get_intermediate_layers(self, images, *, n=1):
        tokens = self.stem(images).flatten(2).mT  # (B, h * w, D); textures need no positions
        return [self.norm(self.blocks(tokens))]


class Backbone(nn.Module):
    """Patch features of a hub model: images (B, 3, H, W) -> (B, D, H / p, W / p)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.embed_dim = model.embed_dim
        self.patch_size = getattr(model, "patch_size", None) or model.patch_embed.patch_size
        if not hasattr(model, "get_intermediate_layers"):
            raise TypeError("it gives no patch tokens")

    def forward(self, images: Tensor) -> Tensor:
        h = images.shape[2] // self.patch_size
        w = images.shape[3] // self.patch_size
        tokens = self.model.get_intermediate_layers(images, n=1)[0]
        patches = tokens[:, -h * w :]  # DINO has its class token in front
        return patches.mT.unflatten(2, (h, w))  # (B, h * w, D) -> (B, D, h, w)

    def checked_size(self, flag, asked, default):
        """The side of images in pixels, as asked or by default: a multiple of the patch size."""
        size = asked
        if asked is None:
            size = default // self.patch_size * self.patch_size
        if size % self.patch_size:
            raise InputError(f"{flag} {size}: give a multiple of the patch size, {self.patch_size}")
        return size


def load_backbone(
    name: str = "dinov2_vits14_reg", hub: str | None = None, weights: str | None = None
) -> Backbone:
    """Load a hub model as a module from images to a map of patch features.

    Args:
        name: entry point of the hub, or `tiny` for the small random one of this file.
        hub: `owner/repo[:branch, tag or commit]` on GitHub, whose code is run, or a local folder
            with a hubconf.py. Default: the one in HUBS.
        weights: file or URL of a state dict instead of the hub's: of this project, of the model's
            authors, or a published NeCo checkpoint. Its head is left out, all else must match.

    Returns:
        A module in training mode with `patch_size` p, `embed_dim` D and `forward(images)`, from
        ImageNet-normalised images (B, 3, H, W), H and W multiples of p, to (B, D, H/p, W/p).

    Raises:
        InputError: the hub is out of reach, has no such vision transformer, or the weights do not
            fit.
    """
    start = name.split("_")[0]
    default_hub, options = HUBS.get(start, (None, {}))
    hub = default_hub if hub is None else hub
    try:
        if hub is not None:
            source = "local" if os.path.isdir(hub) else "github"
            options = {"source": source, "pretrained": weights is None, **options}
            options["skip_validation"] = True  # validation knows branches and tags, but no commits
            model = torch.hub.load(hub, name, trust_repo=True, **options)
        elif name == "tiny":
            model = TinyViT()
        else:
            raise ValueError("in none of the hubs")
        backbone = Backbone(model)
        if weights is not None:
            load_weights(model, weights)
    except Exception as error:  # the network, the code of the hub and torch.load may raise anything
        raise InputError(
            f"--backbone {name}, --hub {hub}, --weights {weights}: {str(error)[:300]}; give "
            "dinov2_*, dinov3_*, dino_*, tiny, or another vision transformer and its --hub "
            "(owner/repo, or a folder with hubconf.py); without a network, a folder and --weights"
        ) from error
    return backbone.train()


def load_weights(model: nn.Module, weights: str) -> None:
    """Load a state dict from a file or URL into a model, without the heads of its training."""
    if "://" in weights:
        # Its name in the cache; by default the last part of the URL, which others may share.
        name = f"{zlib.crc32(weights.encode())}.pth"
        load = functools.partial(torch.hub.load_state_dict_from_url, file_name=name)
    else:
        load = torch.load
    state = load(weights, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    own = model.state_dict()
    heads = ("projection_head.", "head.", "dino_head.", "ibot_head.")
    state = {key: state[key] for key in state if key in own or not key.startswith(heads)}
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------- sorting
# A wire holds a number. A comparator joins two wires and swaps their numbers, unless the smaller
# one is already on the wire with the smaller index. A sorting network is a fixed list of
# comparators, arranged in layers: those of a layer touch different wires and work at the same time.
# Relaxed, a comparator mixes its two numbers: hardly if they are in order, and almost a swap if
# not. To see who takes which rank, each wire also keeps a row: the share of every item in its
# number, at first all of its own item. Rows are mixed as numbers are, and in the end they are the
# soft permutation.


@functools.cache
def sorting_network(n: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return the bitonic sorting network of n >= 1 wires as a list of stages.

    Stage k = 0, 1, ... merges pairs of sorted blocks of 2^k wires. It is a tensor (k + 1, n), a row
    for each layer: its entry i is the wire that wire i is compared with, or i itself where it is
    left alone. The smaller number always goes to the wire with the smaller index. For n = 4 there
    are two stages: [[1, 0, 3, 2]], then [[3, 2, 1, 0], [1, 0, 3, 2]].

    Source: Batcher, "Sorting networks and their applications", 1968. A merge into blocks of S wires
    compares wire i with its mirror image in the block, i XOR (S - 1), which replaces reversing one
    half, and then with i XOR S/4, S/8, ..., 1. If n is no power of two, take the network of the
    next power of two and think of its first wires as holding the smallest elements: these never
    move, so the wires and their comparators are left out.
    """
    stages = (n - 1).bit_length()
    front = 2**stages - n  # wires that are left out
    network = []
    with torch.inference_mode(False):  # what is cached must serve training too
        wires = torch.arange(front, 2**stages, device=device)
        for stage in range(stages):
            masks = [2 ** (stage + 1) - 1]  # the mirror image
            masks += [2**k for k in reversed(range(stage))]
            partners = torch.stack([wires ^ mask for mask in masks])
            network.append(torch.where(partners < front, wires, partners) - front)
    return network


def soft_sort(x: Tensor, steepness: float = 100.0) -> tuple[Tensor, Tensor]:
    """Sort the last dimension with a differentiable sorting network.

    Args:
        x: (..., n), n at least 1. Half precision is computed in float32.
        steepness: s > 0 of the comparators; the sort becomes exact as s times the gaps grows.

    Returns:
        values (..., n), ascending in the limit of a large steepness, and the soft permutation
        (..., n, n) as [rank, item], smallest first: rows and columns sum to 1, and
        values = permutation @ x. Both can be differentiated any number of times.

    Source: Petersen et al., "Monotonic differentiable sorting networks", ICLR 2022, with the
    Cauchy distribution. A comparator of wires lo and hi mixes lo' = (1 - w) lo + w hi and
    hi' = (1 - w) hi + w lo, with w = 1/2 - atan(s (x_hi - x_lo)) / pi: near 0 if they are in order.
    """
    lead, n = x.shape[:-1], x.shape[-1]
    x = x if x.dtype == torch.float64 else x.float()
    x = x.reshape(-1, n).T.contiguous()  # (n, B): reading a wire copies a whole row
    network = sorting_network(n, x.device)
    wires = torch.arange(n, device=x.device)
    # A share is stored only where it can differ from 0, which saves half the work. Before stage k a
    # wire mixes items of its own block of 2^k wires alone: a column for each of these is enough.
    # Four wires with the items a, b, c and d have the columns
    #     start:    [a]  [b]  [c]  [d]
    #     stage 0:  [a b]  [a b]  [c d]  [c d]
    #     stage 1:  [a b c d] on every wire
    permutation = x[:, None] * 0 + 1  # (n, 1, B) ones; for n = 1 they still depend on x
    for stage, layers in enumerate(network):
        # Two blocks merge: columns for the items of the left block, then for those of the right,
        # with zeros on the wires of the other block. If n is no power of two, the single block of
        # the last stage has columns for the wires that are left out: the first ones, and dropped.
        block = (wires + 2 ** len(network) - n) >> stage
        right = (block % 2).view(-1, 1, 1)  # 1 on the wires of a right block, else 0
        columns = [permutation * (1 - right), permutation * right]
        permutation = torch.cat(columns, dim=1)[:, -n:]
        for partner in layers:
            sign = (partner - wires).sign()[:, None]  # 1 on the first wire of two, -1 on the second
            other = x.index_select(0, partner)
            gap = sign * (other - x)  # x_hi - x_lo on both, (n, B)
            # The angle of the point (s gap, 1): 1/2 - atan(s gap) / pi, exact also near 0.
            w = torch.atan2(torch.ones_like(x), gap * steepness) / math.pi
            x = torch.lerp(x, other, w)
            other = permutation.index_select(0, partner)
            permutation = torch.lerp(permutation, other, w[:, None])
    values = x.T.reshape(*lead, n)
    return values, permutation.permute(2, 0, 1).reshape(*lead, n, n)


# ---------------------------------------------------------------------------------------- loss
# Two patches of the same place, one of the student and one of the teacher, are compared with the
# same R references. The student's ranking P of these must become the teacher's, Q.


def cosine_similarity(patches: Tensor, references: Tensor) -> Tensor:
    """Patches (..., N, D), references (..., R, D) -> (..., N, R) in float32 (float64 if given)."""
    with torch.autocast(patches.device.type, enabled=False):
        dtype = torch.promote_types(patches.dtype, torch.float32)
        patches = F.normalize(patches.to(dtype), dim=-1)
        references = F.normalize(references.to(dtype), dim=-1)
        return patches @ references.mT


def neco_loss(
    student: Tensor,
    teacher: Tensor,
    references: Tensor,
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
    with_floor: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Patch neighbor consistency: the student must rank the references as the teacher does.

    Args:
        student: patch features (..., N, D) that are trained. Need not be normalised.
        teacher: features (..., N, D) of the same places in another view; gets no gradient.
        references: the R patches that all N are compared with, (..., R, D); get no gradient.
        steepness: s > 0 of the student's sorting network, and of the teacher's by default.
        teacher_steepness: above `steepness`, it sharpens the target.
        with_floor: return the floor of the loss, too.

    Returns:
        For each reference the cross-entropy of its probabilities to take each rank, averaged over
        references and patches: -(Q * log P).sum(ranks).mean(), with Q the teacher's soft
        permutation [rank, item] and P the student's. A scalar, float32, or float64 for float64
        features; differentiable once, and not available in torch.inference_mode. It is the entropy
        of Q plus the divergence of P from Q. The divergence is 0 if both have the same similarities
        and steepness; the same order with other gaps costs a little. With `with_floor` a pair: the
        loss, and its floor, the entropy of Q.

    Raises:
        ValueError: student and teacher have different shapes.

    Source: Pariza et al., arXiv 2408.11054, section 3 ("patch neighbor consistency").
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)}, but teacher {tuple(teacher.shape)}")
    if teacher_steepness is None:
        teacher_steepness = steepness
    references = references.detach()
    x = cosine_similarity(student, references).flatten(0, -2)  # (patches, R)
    y = cosine_similarity(teacher.detach(), references).flatten(0, -2)
    loss, floor = RankingLoss.apply(x, y, steepness, teacher_steepness)
    return (loss, floor) if with_floor else loss


class RankingLoss(torch.autograd.Function):
    """Cross-entropy of the soft permutations of similarities x and y, (patches, R), and its floor.

    Autograd would keep dozens of R x R matrices for each patch. As the loss is a mean over patches,
    its value and its gradient are computed together, some patches at a time, and the matrices of
    these are freed at once. (torch.utils.checkpoint instead takes half as much time again.)
    """

    @staticmethod
    def forward(ctx, x, y, steepness, teacher_steepness):
        # As many patches as keep a GPU busy; on a CPU fewer, whose matrices fit a core's cache.
        numbers = 2**25 if x.is_cuda else 2**19
        count = max(1, numbers // x.shape[1] ** 2)
        total, floor = x.new_zeros(2)
        gradients = []
        for some_x, some_y in zip(x.split(count), y.split(count)):
            _, Q = soft_sort(some_y, teacher_steepness)
            with torch.enable_grad():
                some_x = some_x.detach().requires_grad_()
                _, P = soft_sort(some_x, steepness)
                smallest = torch.finfo(P.dtype).tiny
                loss = -(Q * P.clamp_min(smallest).log()).sum() / x.numel()
            (gradient,) = torch.autograd.grad(loss, some_x)
            gradients.append(gradient)
            total += loss.detach()
            floor += torch.special.entr(Q).sum() / x.numel()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(floor)
        return total, floor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return grad * torch.cat(ctx.saved_tensors), None, None, None


# --------------------------------------------------------------------------------------- views
# Each image is cut into crops, in the recipe 2 large (global) and 4 small (local) ones. Their boxes
# travel with them and tell which places two crops share. No crop is flipped: boxes say it all.

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class CropKind(NamedTuple):
    """Crops of one size. An image has a list of kinds, of which the first are the global crops."""

    count: int  # in each image
    size: int  # side in pixels
    share: tuple[float, float]  # of the image's area, least and most
    overlap: float  # least share of the image's area in common with each global crop before it


def blur(image: Image.Image) -> Image.Image:
    sigma = 0.1 + 1.9 * torch.rand(()).item()
    return image.filter(GaussianBlur(sigma))


change_colours = v2.Compose(  # of a Pillow image, as in the public recipe
    [
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, hue=0.2)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], p=0.5),
    ]
)


def read_image(path: str | Path) -> Tensor:
    """Read an image file of any mode, the right way up, as RGB: uint8 (3, H, W).

    Pixels of more than 8 bits go from black to white between the image's least and largest value.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            pixels = np.asarray(image, dtype=float)
            pixels = pixels - pixels.min()
            pixels = 255 * pixels / max(pixels.max(), 1e-12)
            image = Image.fromarray(pixels.round().astype(np.uint8))
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """What boxes (..., 4) of left, top, right, bottom share: a box, right < left if nothing."""
    left_top = torch.maximum(a, b)[..., :2]
    right_bottom = torch.minimum(a, b)[..., 2:]
    return torch.cat([left_top, right_bottom], dim=-1)


def random_box(image: Tensor, kind: CropKind, others: Tensor) -> Tensor:
    """Draw the box of a crop of an image (3, H, W), in pixels, that overlaps others (N, 4).

    Its aspect ratio is 3/4 to 4/3, its share of the image as the kind says. An elongated image may
    have no room for such a box: then it is the largest in the middle, 13 % of an image of 10:1.
    Beyond 66:1 even these share less than 2 %, and after 100 trials it is the whole image.
    """
    height, width = image.shape[-2:]
    least = kind.overlap * height * width
    for _ in range(100):
        place = v2.RandomResizedCrop.get_params(image, kind.share, (3 / 4, 4 / 3))
        top, left, h, w = place
        box = torch.tensor([left, top, left + w, top + h])
        shared = intersection(box, others)
        sides = shared[:, 2:] - shared[:, :2]
        if (sides.clamp(min=0).prod(dim=1) > least).all():
            return box
    return torch.tensor([0, 0, width, height])


def make_views(image: Tensor, kinds: list[CropKind]) -> dict:
    """Cut the crops of an image, uint8 (3, H, W), and change their colours.

    Returns `crops`, for each kind (count, 3, size, size), uint8, and `boxes` (crops, 4): their
    left, top, right and bottom in image pixels. `torch.manual_seed` decides what is random.

    Source: multi-crop (Caron et al., SwAV, 2020) with the sizes of the public NeCo recipe.
    """
    boxes = torch.empty(0, 4)
    crops = [[] for _ in kinds]  # for each kind a list
    for kind, crops_of_kind in zip(kinds, crops):
        for _ in range(kind.count):
            box = random_box(image, kind, boxes[: kinds[0].count])
            boxes = torch.cat([boxes, box[None]])
            left, top, right, bottom = box.tolist()
            place = top, left, bottom - top, right - left
            crop = v2.functional.resized_crop(image, *place, [kind.size, kind.size])
            crop = change_colours(v2.functional.to_pil_image(crop))  # faster there than on tensors
            crops_of_kind.append(v2.functional.pil_to_tensor(crop))
    crops = [torch.stack(crops_of_kind) for crops_of_kind in crops if crops_of_kind]
    return {"crops": crops, "boxes": boxes}


def align(features: Tensor, crop: Tensor, region: Tensor, grid: int) -> Tensor:
    """Read grid x grid cells of a region of the image from the feature map of a crop.

    Args:
        features: maps (B, D, h, w) of the crops.
        crop, region: boxes (B, 4) in image pixels, the region inside the crop. Cell k of a region
            is the same place in all crops. The exception is the edge of a crop, where a map has no
            neighbour to interpolate with: there, a cell is read up to half a patch further inside.
        grid: cells a side.

    Returns:
        (B, grid * grid, D), row by row.

    Source: RoI-align (He et al., Mask R-CNN, 2017), as in arXiv 2408.11054, section 3.
    """
    origin = crop[:, :2].repeat(1, 2)
    corner = crop[:, 2:].repeat(1, 2)
    boxes = (region - origin) / (corner - origin)
    boxes[:, 0::2] *= features.shape[3]  # now in patches of the crop
    boxes[:, 1::2] *= features.shape[2]
    boxes = list(boxes[:, None])  # one in each map
    cells = roi_align(features, boxes, grid, aligned=True)
    return cells.flatten(2).mT  # (B, D, grid, grid) -> (B, N, D)


# ------------------------------------------------------------------------------------ training
# Whatever is random is a function of the seed and of step and image: on a CPU neither workers nor
# interruptions change a bit of the result. With torchrun, each process works on a slice of every
# batch, `mine`; gradients and queues are summed over all, so that their states stay the same.

GLOBAL_CROPS = 2
PATCHES_PER_IMAGE = 10  # so many enter the queue of each global crop in a step
# Flags that may change when a run is resumed:
MAY_CHANGE = ("data", "out", "ranks", "workers", "device", "accumulate", "log_every", "save_every")


def seed_of(*key: int | str) -> int:
    """A seed that is a function of the key, alike on every machine."""
    return zlib.crc32(repr(key).encode())


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; a single process leaves it as it is."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def find_images(folder):
    """List the image files below a folder, sorted: an array of bytes, which workers do not copy.

    Links to folders are followed, but none is entered twice.
    """
    found, entered = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in entered:
            folders.clear()
        else:
            entered.add(os.path.realpath(place))
            folders.sort()
            images = [name for name in names if name.lower().endswith(IMAGE_TYPES)]
            found += [os.path.join(place, name) for name in images]
    return np.array(sorted(map(os.fsencode, found)))


def draw_batch(images, size, step, seed):
    """The batch of a step, in epochs of shuffled images: a list of keys of `Views`."""
    epoch, place = divmod(step, images // size)
    shuffle = np.random.default_rng(seed_of(seed, "epoch", epoch))
    order = shuffle.permutation(images)[place * size : (place + 1) * size]
    return [(step, image) for image in order.tolist()]


class Views(Dataset):
    """The views of an image in a step, as `make_views` returns them; its key is (step, image)."""

    def __init__(self, files, kinds, seed):
        self.files, self.kinds, self.seed = files, kinds, seed

    def __getitem__(self, key):
        step, image = key
        torch.manual_seed(seed_of(self.seed, "views", step, image))
        for _ in range(100):
            path = os.fsdecode(self.files[image])
            try:
                return make_views(read_image(path), self.kinds)
            except Exception as error:  # Pillow raises many kinds; another file takes its place
                print(f"neco.py: skipped {path}, cannot be read: {error}", file=sys.stderr)
            image = torch.randint(len(self.files), ()).item()
        raise InputError(f"--data: 100 files in a row cannot be read, the last one {path}")


class Network(nn.Module):
    """Backbone and head, from crops to L2-normalised embeddings of their patches."""

    def __init__(self, backbone, hidden):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(backbone.embed_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 256),
        )
        for layer in self.head[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, crops):
        """Embed K crops of each image, (b, K, 3, S, S): a list of K maps (b, 256, h, w)."""
        features = self.backbone(crops.flatten(0, 1))  # (b * K, D, h, w)
        embeddings = self.head(features.movedim(1, -1)).float()
        embeddings = F.normalize(embeddings, dim=-1).movedim(-1, 1)
        return embeddings.unflatten(0, crops.shape[:2]).unbind(1)


class Run(nn.Module):
    """All that training changes: student, teacher, queues of teacher patches, and the optimiser."""

    def __init__(self, backbone, args):
        super().__init__()
        # Both heads start alike. The public code draws two, which learned more slowly (README).
        self.student = Network(backbone, args.hidden)
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("queue", torch.zeros(GLOBAL_CROPS, args.queue, 256))  # newest first
        self.to(args.device)
        groups = []
        rates = {self.student.backbone: args.lr, self.student.head: args.head_lr}
        for part, rate in rates.items():
            for decays in (True, False):  # parameters of one dimension, as biases, do not decay
                chosen = [p for p in part.parameters() if (p.ndim > 1) == decays]
                groups.append({"params": chosen, "first_lr": rate, "decays": decays})
        self.optimizer = torch.optim.AdamW(groups, fused=True)


def push_patches(queue, maps, count, batch_size, mine, rng):
    """Put `count` random patches of each image of a batch in front of the queues.

    Takes and returns queues (2, Q, D), one for each global crop. The maps are those of the teacher,
    for each global crop (b, D, h, w), of the images at `mine` in the batch. The places of the
    patches are the same in all of them.
    """
    patches = torch.stack(maps).flatten(3).mT  # (2, b, h * w, D)
    places = torch.randperm(patches.shape[2], generator=rng, device=rng.device)
    patches = patches[:, :, places[:count]]
    new = patches.new_zeros(len(maps), batch_size, *patches.shape[2:])
    new[:, mine] = patches
    new = all_reduce(new).flatten(1, 2)  # a gather, as each process leaves the others' images at 0
    longer = torch.cat([new, queue], dim=1)
    return longer[:, : queue.shape[1]]


def draw_references(queue, pairs, batch_size, count, rng):
    """Draw references from a queue (Q, D) for each image in each pair: (pairs, images, count, D).

    They are the patches with the highest of Q random numbers, hence none twice for an image.
    """
    size = pairs, batch_size, len(queue)
    numbers = torch.rand(size, generator=rng, device=queue.device)
    return queue[numbers.topk(count).indices]


def align_pairs(student_maps, teacher_maps, boxes, grid):
    """Read the same places from student and teacher, for every pair of crops.

    Takes lists of maps (B, D, h, w), one for each crop, the global ones first, and boxes
    (B, crops, 4). Returns the cells of both, (pairs, B, grid * grid, D). In a pair the teacher sees
    a global crop g, the student another crop v; pairs of the first global crop come first.
    """
    student, teacher = [], []
    for g, teacher_map in enumerate(teacher_maps):
        for v, student_map in enumerate(student_maps):
            if v != g:
                region = intersection(boxes[:, g], boxes[:, v])
                student.append(align(student_map, boxes[:, v], region, grid))
                teacher.append(align(teacher_map, boxes[:, g], region, grid))
    return torch.stack(student), torch.stack(teacher)


def set_rates(optimizer, cosine, weight_decay):
    """Set learning rates and weight decay for a cosine that falls from 1 to 0 over a training."""
    first, last = weight_decay
    for group in optimizer.param_groups:
        group["lr"] = group["first_lr"] * cosine
        group["weight_decay"] = (last + (first - last) * cosine) * group["decays"]


@torch.no_grad()
def follow(teacher, student, share):
    """Move the teacher's weights by a share of their distance towards the student's."""
    for average, parameter in zip(teacher.parameters(), student.parameters()):
        average.lerp_(parameter, share)


def train_step(run, batch, args, step, mine):
    """Take step number `step`, counted from 0, with the settings `args`, named as the flags.

    `batch` is what `make_views` returns, stacked for the b images at `mine` in the whole batch.
    Returns the loss and its floor, means over the whole batch.
    """
    rng = torch.Generator(args.device)  # alike in all processes
    rng.manual_seed(seed_of(args.seed, "step", step))
    torch.manual_seed(seed_of(args.seed, "drop path", step, mine.start))
    half = args.precision == "bf16"
    autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=half)
    B, R = args.batch_size, args.grid**2

    # Views: global crops (b, 2, 3, S, S), local ones (b, 4, 3, s, s), and their boxes (b, 6, 4).
    views = []
    for crops in batch["crops"]:
        crops = crops.to(args.device, non_blocking=True) / 255
        views.append(v2.functional.normalize(crops, MEAN, STD))
    boxes = batch["boxes"].to(args.device, non_blocking=True)
    # Teacher: it reads the global crops.
    with torch.no_grad(), autocast:
        teacher_maps = run.teacher(views[0])
    # Queue: some of its patches enter the queues, the oldest ones leave. In a small batch each
    # image adds more of them, so that there are R to draw from in the first step already.
    added = max(PATCHES_PER_IMAGE, math.ceil(R / B))
    added = min(added, teacher_maps[0][0, 0].numel())
    run.queue = push_patches(run.queue, teacher_maps, added, B, mine, rng)
    filled = min((step + 1) * B * added, args.queue)
    # References: R patches of a queue, which may be of this batch, others for each image in each
    # pair of crops. R = N, the cells of a pair, is the paper's choice; the loss does not need it.
    pairs = boxes.shape[1] - 1  # of one global crop with another crop
    drawn = []
    for queue in run.queue:
        drawn.append(draw_references(queue[:filled], pairs, B, R, rng))
    references = torch.cat(drawn)[:, mine]  # (2 * pairs, b, R, 256), as in align_pairs

    loss, floor = torch.zeros(2, device=args.device)
    run.optimizer.zero_grad()
    images = torch.arange(len(boxes), device=args.device)
    for part in images.chunk(args.accumulate):
        # Student: it reads all crops.
        student_maps = []
        with autocast:
            for crops in views:
                student_maps += run.student(crops[part])
        target_maps = [maps[part] for maps in teacher_maps]
        cells, targets = align_pairs(student_maps, target_maps, boxes[part], args.grid)
        # Loss: in each cell (2 * pairs, b, N) it has to rank the references as the teacher does.
        compared = references[:, part]
        steepnesses = args.steepness, args.teacher_steepness
        part_loss, part_floor = neco_loss(cells, targets, compared, *steepnesses, with_floor=True)
        share = len(part) / B  # of these images in the whole batch
        (part_loss * share).backward()
        loss += part_loss.detach() * share
        floor += part_floor * share
    # Step: AdamW moves the student. The rates follow a cosine to 0, the weight decay to its end.
    for parameter in run.student.parameters():
        if parameter.grad is not None:
            all_reduce(parameter.grad)
    cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
    set_rates(run.optimizer, cosine, args.weight_decay)
    run.optimizer.step()
    # Average: the teacher follows the student, ever more slowly: its momentum goes to 1.
    follow(run.teacher, run.student, (1 - args.momentum) * cosine)
    return all_reduce(loss), all_reduce(floor)


def save(content, path):
    """Write tensors by way of a temporary name: the old or the new file is there, whole."""
    temporary = f"{path}.tmp"
    try:
        torch.save(content, temporary)
    except RuntimeError as error:  # what torch makes of a full disk
        raise InputError(f"--out: {temporary} cannot be written: {error}") from error
    os.replace(temporary, path)


def save_run(run, step, log, settings, out):
    """Write checkpoint, backbones and log, unless the weights are not finite: then exit."""
    norms = [parameter.norm() for parameter in run.parameters()]
    if not torch.stack(norms).isfinite().all():
        sys.exit(
            f"neco.py: the weights are not finite after step {step}; what was saved before stays "
            f"in {out}: try a lower --lr and --head-lr"
        )
    state = {"step": step, "log": log, "settings": settings}
    state["run"] = run.state_dict()
    state["optimizer"] = run.optimizer.state_dict()
    save(state, out / "checkpoint.pth")
    for network in ("student", "teacher"):
        weights = getattr(run, network).backbone.model.state_dict()
        weights = {key: value.cpu() for key, value in weights.items()}
        save(weights, out / f"{network}.pth")
    columns = "step,loss,floor,lr,weight_decay"
    np.savetxt(out / "log.csv", log, "%.6g", ",", header=columns, comments="")


def load_run(run, settings, out):
    """Load the checkpoint; return its step and log. InputError if it has other settings."""
    try:
        state = torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=True)
        before = state["settings"]
    except Exception as error:  # torch.load raises errors of many kinds
        raise InputError(f"--out: {out}/checkpoint.pth is broken: move it") from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(
                f"--out: the run in {out} has {name} {before.get(name)}, not {value}: set it so, "
                "or take another folder"
            )
    if state["step"]:
        run.load_state_dict(state["run"])
        run.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["log"]


def load_views(args, files, steps, mine):
    """Iterate over the views of the images at `mine` in the batches of some steps."""
    kinds = [
        CropKind(GLOBAL_CROPS, args.global_size, share=(0.25, 1.0), overlap=0.02),
        CropKind(args.local_crops, args.local_size, share=(0.05, 0.25), overlap=0.01),
    ]
    batches = (draw_batch(len(files), args.batch_size, step, args.seed)[mine] for step in steps)
    loader = DataLoader(
        Views(files, kinds, args.seed),
        batch_sampler=batches,
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )
    return iter(loader)


def claim(checkpoint, settings):
    """Create a first checkpoint, if there is none, with settings that later runs must have too.

    Of two runs that start together only one can create it.
    """
    with contextlib.suppress(FileExistsError), open(checkpoint, "xb") as file:
        torch.save({"step": 0, "log": [], "settings": settings}, file)


def train(args, files):
    """Train from the start, or on from args.out/checkpoint.pth, and return the exit status.

    Ctrl-C and SIGTERM end it after the step under way, saved, with status 130 and 143.
    """
    rank = int(os.environ.get("RANK", 0))  # as torchrun sets it
    mine = slice(rank, None, args.ranks)
    if rank > 0:
        all_reduce(torch.zeros(1))  # wait: the first process fills the cache of torch.hub
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, args.hub, args.weights)
    args.global_size = backbone.checked_size("--global-size", args.global_size, 518)
    args.local_size = backbone.checked_size("--local-size", args.local_size, 98)
    run = Run(backbone, args)

    out = Path(args.out)
    settings = vars(args).copy()
    for name in MAY_CHANGE:
        del settings[name]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        claim(out / "checkpoint.pth", settings)
        all_reduce(torch.zeros(1))  # lets the others go on
    first, log = load_run(run, settings, out)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the loader's workers, which start now
    loader = load_views(args, files, range(first, args.steps), mine)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda arrived, _: signals.append(arrived))

    start = time.monotonic()
    for step in range(first, args.steps + 1):  # steps that have been taken
        # The first process saves, stops and reports. Without it the others fail in all_reduce.
        ends = step == args.steps or (rank == 0 and signals)
        saves = ends or step == first or step % args.save_every == 0
        if rank == 0 and saves:  # at first to see at once whether the folder can be written
            save_run(run, step, log, settings, out)
        if ends:
            break
        loss, floor = train_step(run, next(loader), args, step, mine)
        taken = step + 1
        logs = taken % args.log_every == 0 or taken in (1, args.steps)
        if rank == 0 and logs:
            rates = run.optimizer.param_groups[0]
            log.append([taken, loss.item(), floor.item(), rates["lr"], rates["weight_decay"]])
            pace = (time.monotonic() - start) / (taken - first)
            report(log[-1], args, pace)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if step < args.steps:
        return 128 + signals[-1]
    if rank == 0:
        hub = f" --hub {args.hub}" if args.hub else ""
        print(
            f"{out} holds student.pth, teacher.pth, checkpoint.pth, log.csv. To see what changed:\n"
            f"python eval_seg.py --data {args.data} --backbone {args.backbone}{hub} "
            f"--weights {args.weights or 'none'} {out}/student.pth --pictures 6"
        )
    return 0


def report(row, args, pace):
    """Print a row of the log and the time left, at a pace in seconds a step."""
    step, loss, floor, *_ = row
    hours = (args.steps - step) * pace / 3600
    print(
        f"step {step}/{args.steps}  loss {loss:.3f} = floor {floor:.3f} + {loss - floor:.3f}  "
        f"{args.batch_size / pace:.1f} images/s  {hours:.1f} h left",
        flush=True,
    )
    if floor > 0.95 * math.log(args.grid**2):
        advice = "try a lower --lr, a --momentum nearer to 1, or a higher --teacher-steepness"
        print(f"neco.py: warning: the teacher's rankings are flat: {advice}", file=sys.stderr)


# -------------------------------------------------------------------------------- command line
# Every default is the paper's recipe. Likely mistakes end in a sentence and exit status 2.


def number(kind, least, most=math.inf):
    """A type of flag: a number of a kind, int or float, from `least` to `most`."""

    def read_number(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least} and at most {most}")
        return value

    read_number.__name__ = kind.__name__  # for the message of argparse
    return read_number


def device(text):
    """A type of flag: a device of torch that is there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not there: {error}") from error


def flags(usage):
    """A parser with the flags that neco.py and eval_seg.py share, and a function to add more."""
    parser = argparse.ArgumentParser(usage.split()[0], usage=usage)

    def add(flag, kind, default, text, **more):
        text += "" if default is None else " (%(default)s)"
        parser.add_argument(flag, type=kind, default=default, help=text, **more)

    accelerator = f"cuda:{dist.get_node_local_rank(0)}" if torch.cuda.is_available() else "cpu"
    processes = min(16, os.cpu_count() or 1)
    add("--backbone", str, "dinov2_vits14_reg", "dinov2_*, dinov3_*, dino_*, tiny, or any of --hub")
    add("--hub", str, None, "owner/repo[:ref] or local folder with hubconf.py; its code is run")
    add("--device", device, accelerator, "cpu, cuda, cuda:1, ...")
    precision = "of the networks (bf16 on a GPU: give fp32 if it is older than Ampere; else fp32)"
    add("--precision", str, None, precision, choices=["bf16", "fp32"])
    add("--workers", number(int, 0), processes, "processes that read images")
    add("--seed", number(int, 0, 2**63 - 1), 0, "of all that is random")
    return parser, add


def run_command(command, parser, argv):
    """Call `command` with the arguments; what the user can put right ends in a sentence."""
    args = parser.parse_args(argv)
    if args.precision is None:
        args.precision = "bf16" if args.device.type == "cuda" else "fp32"
    try:
        return command(args)
    except InputError as error:  # a worker of the loader puts its traceback before the sentence
        sentence = str(error).split("InputError: ")[-1]
        return parser.error(" ".join(sentence.split()))
    except torch.cuda.OutOfMemoryError:
        return parser.error("the GPU is out of memory: a higher --accumulate, or smaller numbers")
    except OSError as error:
        return parser.error(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")


def prepare(args):
    """Check what takes more than one flag to check, and train."""
    args.ranks = int(os.environ.get("WORLD_SIZE", 1))
    parts = args.accumulate * args.ranks
    if args.batch_size % parts:
        raise InputError(
            f"--batch-size {args.batch_size} cannot be shared out: give a multiple of {parts}, "
            "which is --accumulate times the processes"
        )
    if args.queue < args.grid**2:
        raise InputError(f"--queue {args.queue} is less than the {args.grid**2} cells of --grid")
    if not os.path.isdir(args.data):
        raise InputError(f"--data {args.data} is not there, or is no folder")
    files = find_images(args.data)
    if len(files) < args.batch_size:
        raise InputError(
            f"--data {args.data} holds {len(files)} images ({' '.join(IMAGE_TYPES)}): give another "
            f"folder, or a lower --batch-size than {args.batch_size}"
        )
    args.images = len(files)
    if args.steps is None:
        args.steps = args.epochs * (args.images // args.batch_size)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.ranks > 1:  # started by torchrun
        dist.init_process_group()
    return train(args, files)


def main(argv=None):
    """Run the command line; return the exit status, or raise SystemExit(2) after bad input."""
    parser, add = flags("neco.py --data FOLDER [options]")
    natural = number(int, 1)
    rate = number(float, 0)
    steepness = number(float, 1e-6)
    add("--data", str, None, "folder of images, searched recursively; no labels", required=True)
    add("--out", str, "runs/neco", "folder for the results; a run in it is resumed")
    add("--weights", str, None, "state dict to start from, a file or URL, instead of the hub's")
    add("--epochs", natural, 25, "passes over the images")
    add("--steps", natural, None, "number of steps, instead of epochs; the schedules span it")
    add("--batch-size", natural, 64, "images a step, over all processes")
    add("--accumulate", natural, 1, "parts of a batch, one after the other, to save memory")
    add("--global-size", natural, None, "side of the 2 global crops (518, or a bit less)")
    add("--local-size", natural, None, "side of the local crops (98, or a bit less)")
    add("--local-crops", number(int, 0), 4, "local crops of an image")
    add("--grid", natural, 7, "each pair of crops has N x N cells, compared with N x N references")
    add(
        "--queue",
        natural,
        8192,
        "teacher patches to draw from, at least N x N (--grid); a batch adds 640",
    )
    add("--hidden", natural, 2048, "width of the head; less for a small backbone")
    add("--lr", rate, 1e-5, "learning rate of the backbone; three times as much can do harm")
    add("--head-lr", rate, 1e-4, "learning rate of the head")
    add("--weight-decay", rate, [0.04, 0.5], "of AdamW, at the start and at the end", nargs=2)
    momentum = "of the teacher, 1 at the end; the teacher hardly moves in a short run"
    add("--momentum", number(float, 0, 1), 0.9995, momentum)
    add("--steepness", steepness, 100.0, "of the sorting network; the higher, the harder the sort")
    teacher = "as --steepness; a higher one works against collapse"
    add("--teacher-steepness", steepness, None, teacher)
    add("--log-every", natural, 50, "steps between lines of progress and rows of log.csv")
    add("--save-every", natural, 250, "steps between checkpoints")
    return run_command(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
