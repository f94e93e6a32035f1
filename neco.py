# SPDX-License-Identifier: MIT
"""NeCo (Patch Neighbor Consistency, arXiv 2408.11054, ICLR 2025) in one file.

NeCo post-trains a pretrained vision transformer on unlabelled images, so that its patch features
serve dense tasks better. Student and teacher see different crops of one image. A patch of each,
showing the same place, is compared with the same reference patches, drawn at random from a queue
of earlier teacher patches, and the student learns to rank them by similarity as the teacher does.
Ranking is made differentiable by a sorting network.

    python neco.py --data coco/train2017                              # the paper's recipe
    python neco.py --data photos --steps 2000 --batch-size 16 --accumulate 4
    python neco.py --demo                                             # nothing needed, two minutes

The file reads as the paper does: backbone, sorting, loss, views, training, command line. The
functions before the training loop share no state: each can be copied out with those it calls.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align


class InputError(ValueError):
    """Something the user can put right, said in one sentence."""


# ------------------------------------------------------------------------------------ backbone
# Any vision transformer of torch.hub that gives its patch tokens after the final norm, as DINOv2
# and DINO do. Class and register tokens are left out: NeCo works on patches alone.

HUBS = {"dinov2": "facebookresearch/dinov2", "dino": "facebookresearch/dino:main"}
BACKBONES = (
    ["tiny"]
    + [f"dinov2_vit{size}14{registers}" for registers in ("_reg", "") for size in "sblg"]
    + ["dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"]
)
HEAD_KEYS = ("projection_head.", "head.", "dino_head.", "ibot_head.")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A small vision transformer with DINOv2's patch size and interface, and random weights."""

    patch_size = 14

    def __init__(self, embed_dim: int = 64, depth: int = 3, heads: int = 2):
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_embed = nn.Sequential(  # two layers see texture sooner than one
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(24, embed_dim, 7, stride=7),
        )
        self.blocks = nn.ModuleList(Block(embed_dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Sines and cosines of each position at wavelengths from 6 to 600 patches: (length, D/2)"""
        waves = 100 ** torch.linspace(0, -1, self.embed_dim // 4, device=device)
        angles = torch.arange(length, device=device)[:, None] * waves
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(images)  # (B, D, h, w)
        h, w = x.shape[-2:]
        rows, columns = self.positions(h, x.device), self.positions(w, x.device)
        grid = torch.cat([rows[:, None].expand(-1, w, -1), columns.expand(h, -1, -1)], dim=-1)
        x = x.flatten(2).transpose(1, 2) + 0.1 * grid.flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return {"x_norm_patchtokens": self.norm(x)}


class Backbone(nn.Module):
    """Patch features of a hub model: images (B, 3, H, W) -> (B, D, H / p, W / p)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        patch = getattr(model, "patch_size", None) or model.patch_embed.patch_size
        self.patch_size = int(patch[0] if isinstance(patch, tuple) else patch)
        self.embed_dim = int(model.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        h, w = (side // self.patch_size for side in images.shape[-2:])
        if hasattr(self.model, "forward_features"):
            tokens = self.model.forward_features(images)["x_norm_patchtokens"]
        else:  # DINO: the class token, then the patches
            tokens = self.model.get_intermediate_layers(images, 1)[0][:, -h * w :]
        return tokens.transpose(1, 2).unflatten(2, (h, w))  # (B, h*w, D) -> (B, D, h, w)


def load_backbone(
    name: str = "dinov2_vits14_reg", hub: str | None = None, weights: str | None = None
) -> Backbone:
    """Load a hub model as a module from images to a map of patch features.

    Args:
        name: entry point of the hub, or `tiny` for the small random one of this file.
        hub: `owner/repo[:ref]` on GitHub, or a local folder with a hubconf.py. Default: the
            official repository for `dinov2_*` and `dino_*`. torch.hub runs the code it finds.
        weights: state dict to load instead of the hub's: of this project, DINOv2, or a published
            NeCo checkpoint. Keys of a projection head are dropped, all others must match.

    Returns:
        A module with `patch_size` p, `embed_dim` D and `forward(images)`: ImageNet-normalised
        images (B, 3, H, W), H and W multiples of p, to features (B, D, H/p, W/p).

    Raises:
        InputError: the name is unknown, the hub out of reach, or the weights do not fit.
    """
    tiny = name == "tiny" and hub is None
    model = TinyViT() if tiny else load_hub_model(name, hub, weights is None)
    if weights is not None:
        load_weights(model, weights)
    try:
        backbone = Backbone(model)
        p = backbone.patch_size
        with torch.no_grad():
            shape = backbone.eval()(torch.zeros(1, 3, 4 * p, 4 * p)).shape
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(
            f"--backbone {name} cannot be used: it needs patch_size, embed_dim and patch tokens of "
            f"forward_features or get_intermediate_layers ({type(error).__name__}: {error})"
        ) from error
    if shape != (1, backbone.embed_dim, 4, 4):
        raise InputError(
            f"--backbone {name} gives features of shape {tuple(shape)}, not one a patch"
        )
    return backbone.train()


def load_hub_model(name: str, hub: str | None, pretrained: bool) -> nn.Module:
    """Build entry point `name` of a hub, local or on GitHub; raise InputError if it cannot be."""
    if hub is None:
        if name not in BACKBONES:
            raise InputError(
                f"--backbone {name} is unknown: take one of {', '.join(BACKBONES)}, or name its "
                "repository with --hub"
            )
        hub = HUBS[name.split("_")[0]]
    local = Path(hub).is_dir()
    if local and not (Path(hub) / "hubconf.py").is_file():
        raise InputError(
            f"--hub {hub} has no hubconf.py: give a checkout of the model's repository"
        )
    if not local and (hub.count("/") != 1 or hub.startswith((".", "/", "~"))):
        raise InputError(f"--hub {hub} is neither a folder nor owner/repo[:ref]")
    load = functools.partial(
        torch.hub.load, hub, name, source="local" if local else "github", trust_repo=True
    )
    try:
        try:
            return load() if pretrained else load(pretrained=False)
        except TypeError as error:
            if "'pretrained'" not in str(error):
                raise
            return load()  # an entry point without that argument
    except Exception as error:  # the network, and the code of the hub, may raise anything
        raise InputError(
            f"--hub {hub}: cannot build {name} ({error}): give --hub a local checkout that has it, "
            "and where there is no network --weights a file"
        ) from error


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict strictly, but for head keys; raise InputError naming what does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a file that is not its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--weights {path} cannot be read as a state dict ({reason})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(f"--weights {path} is not a state dict: give student.pth or teacher.pth")
    own = model.state_dict()
    heads = [key for key in state if key.startswith(HEAD_KEYS) and key not in own]
    state = {key: value for key, value in state.items() if key not in heads}
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unexpected" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"--weights {path} belongs to another model: {', '.join(problems[:5])}{more}"
        )
    model.load_state_dict(state)
    if heads:
        print(f"{path}: dropped {len(heads)} keys of a projection head", file=sys.stderr)


# ------------------------------------------------------------------------------------- sorting
# Sorting networks swap fixed pairs of wires, layer by layer. Relaxed, a comparator mixes its two
# wires instead of swapping them, and the mixed rows of the identity are a soft permutation.


def sorting_network(n: int, kind: str = "bitonic") -> list[list[tuple[int, int]]]:
    """Return the layers of a sorting network as pairs of wires (lo, hi), each with lo < hi.

    After a comparator the smaller value is on `lo`. The pairs of a layer share no wire.

    Args:
        n: number of wires, at least 1.
        kind: `bitonic` (k (k + 1) / 2 layers, k = ceil(log2 n)) or `odd_even` (n layers).

    Raises:
        ValueError: n below 1, or an unknown kind.

    Source: Batcher 1968; Petersen et al., ICML 2021. The bitonic network is written with all
    comparators in one direction: each merge first compares wire i of a block with its mirror image
    from the end, then wires a quarter of the block apart, an eighth apart, and so on. Up to a
    renaming of wires it is the textbook network of alternating directions. For an n that is no
    power of two, smallest elements fill the front up to the next power: no comparator would ever
    move them, so those that touch them are left out, and the network sorts for every n.
    """
    if n < 1:
        raise ValueError(f"a sorting network needs at least one wire, not {n}")
    if kind == "odd_even":
        return [[(i, i + 1) for i in range(layer % 2, n - 1, 2)] for layer in range(n)]
    if kind != "bitonic":
        raise ValueError(f"kind must be 'bitonic' or 'odd_even', not {kind!r}")
    stages = (n - 1).bit_length()
    virtual = 2**stages - n
    layers = []
    for stage in range(1, stages + 1):
        size = 2**stage
        wires = range(virtual, 2**stages)
        pairs = [(i, i - i % size + size - 1 - i % size) for i in wires if i % size < size // 2]
        layers.append(pairs)
        for distance in (2**k for k in reversed(range(stage - 1))):
            layers.append([(i, i + distance) for i in wires if not i & distance])
    return [[(lo - virtual, hi - virtual) for lo, hi in layer] for layer in layers]


@functools.lru_cache(maxsize=64)
def network_steps(n: int, kind: str, device: torch.device) -> tuple:
    """Turn a network into moves of whole rows: before each layer, bring its wires into the order
    [all lo, all hi, the others], so that its comparators work on two contiguous slices.

    A wire of a bitonic network holds only items of its own block, so its row needs no more columns
    than the block has wires: 1 at first, twice as many after each merge, n at most.

    Returns the steps (order, its inverse, number of comparators, old columns, new columns), then
    the order that brings the wires home and its inverse.
    """
    network = sorting_network(n, kind)
    if kind == "bitonic":
        stages = (n - 1).bit_length()
        widths = [min(2**stage, n) for stage in range(1, stages + 1) for _ in range(stage)]
    else:
        widths = [n] * len(network)
    steps, wires, old = [], list(range(n)), 1 if kind == "bitonic" else n
    for pairs, width in zip(network, widths):
        paired = [lo for lo, _ in pairs] + [hi for _, hi in pairs]
        target = paired + sorted(set(range(n)) - set(paired))
        order = torch.tensor([wires.index(wire) for wire in target], device=device)
        steps.append((order, order.argsort(), len(pairs), old, width))
        wires, old = target, width
    home = torch.tensor([wires.index(wire) for wire in range(n)], device=device)
    return steps, home, home.argsort()


class SoftSort(torch.autograd.Function):
    """The relaxed network on x (rows, n). Wires lead, so that a move of wires copies whole rows;
    column 0 of the state carries the values, the others the rows of the permutation."""

    @staticmethod
    def forward(ctx, x: Tensor, steepness: float, kind: str) -> tuple[Tensor, Tensor]:
        rows, n = x.shape
        steps, home, home_inverse = network_steps(n, kind, x.device)
        width = 1 if kind == "bitonic" else n
        items = torch.ones(n, 1, device=x.device) if width == 1 else torch.eye(n, device=x.device)
        state = torch.cat([x.T[:, None], items.to(x.dtype)[:, :, None].expand(-1, -1, rows)], dim=1)
        saved, one = [], x.new_ones(())
        for order, _, pairs, old, new in steps:
            state = state.index_select(0, order)  # (n, 1 + old, rows)
            if new > old:  # two blocks merge: the lo wires are the left one, all others the right;
                left = new - old  # in the last merge, an n that is no power of two has left < old
                merged = state.new_zeros(n, 1 + new, rows)
                merged[:, 0] = state[:, 0]
                merged[:pairs, 1 : 1 + left] = state[:pairs, 1 + old - left :]
                merged[pairs:, 1 + left :] = state[pairs:, 1:]
                state = merged
            lo, hi = state[:pairs], state[pairs : 2 * pairs]
            difference = lo - hi
            # the share that each wire takes of the other, 1 - alpha = 1/2 + atan(s (lo - hi)) / pi,
            # in a form that keeps its digits where it is small
            swap = torch.atan2(one, -steepness * difference[:, :1]) / math.pi
            lo.addcmul_(swap, difference, value=-1)
            hi.addcmul_(swap, difference)
            saved += [swap, difference]
        ctx.save_for_backward(*saved)
        ctx.steps, ctx.home_inverse, ctx.steepness = steps, home_inverse, steepness
        state = state.index_select(0, home)
        return state[:, 0].T, state[:, 1:].permute(2, 0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values: Tensor, grad_permutation: Tensor):
        grad = torch.cat([grad_values.T[:, None], grad_permutation.permute(1, 2, 0)], dim=1)
        grad = grad.index_select(0, ctx.home_inverse)
        swaps, differences = ctx.saved_tensors[::2], ctx.saved_tensors[1::2]
        for step, swap, difference in zip(ctx.steps[::-1], swaps[::-1], differences[::-1]):
            _, inverse, pairs, old, new = step
            lo, hi = grad[:pairs], grad[pairs : 2 * pairs]
            mixed = lo - hi
            slope = ctx.steepness * difference[:, 0]
            density = ctx.steepness / math.pi / (1 + slope * slope)  # of the Cauchy distribution
            through_swap = density * (mixed * difference).sum(1)
            lo.addcmul_(swap, mixed, value=-1)
            hi.addcmul_(swap, mixed)
            lo[:, 0] -= through_swap
            hi[:, 0] += through_swap
            if new > old:
                left = new - old
                parted = grad.new_zeros(len(inverse), 1 + old, grad.shape[2])
                parted[:, 0] = grad[:, 0]
                parted[:pairs, 1 + old - left :] = grad[:pairs, 1 : 1 + left]
                parted[pairs:, 1:] = grad[pairs:, 1 + left :]
                grad = parted
            grad = grad.index_select(0, inverse)
        return grad[:, 0].T, None, None


def soft_sort(x: Tensor, steepness: float = 100.0, kind: str = "bitonic") -> tuple[Tensor, Tensor]:
    """Sort the last dimension with a differentiable sorting network.

    Args:
        x: (..., n), n at least 1. Half precision is computed in float32, under autocast too.
        steepness: s > 0 of the comparators; the sort becomes exact as s times the gaps grows.
        kind: `bitonic` or `odd_even`, see `sorting_network`.

    Returns:
        values (..., n), ascending in the limit of a large steepness, and the soft permutation
        (..., n, n) as [rank, item], smallest first: rows and columns sum to 1, and
        values = permutation @ x. Both are differentiable in x, once.

    Raises:
        ValueError: no last dimension, a steepness that is not positive, or an unknown kind.

    Source: Petersen et al., "Monotonic differentiable sorting networks", ICLR 2022, with the Cauchy
    distribution: alpha = 1/2 + atan(s (x_hi - x_lo)) / pi, lo' = alpha lo + (1 - alpha) hi and
    hi' = (1 - alpha) lo + alpha hi, for the values and for the rows of the identity alike.
    """
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have a last dimension to sort, its shape is {tuple(x.shape)}")
    if not steepness > 0:
        raise ValueError(f"steepness must be positive, not {steepness}")
    lead, n = x.shape[:-1], x.shape[-1]
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    values, permutation = SoftSort.apply(x.reshape(-1, n), steepness, kind)
    return values.reshape(*lead, n), permutation.reshape(*lead, n, n)


# ---------------------------------------------------------------------------------------- loss
# The student's soft permutation of the references has to match the teacher's. The loss is a mean
# over rows of similarities, so value and gradient are computed together, a block of rows at a
# time, and nothing of size rows x R x R outlives its block.


class RankingLoss(torch.autograd.Function):
    """Cross-entropy of two soft permutations, from similarities (rows, R) to the references."""

    @staticmethod
    def forward(ctx, student, teacher, steepness: float, teacher_steepness: float, kind: str):
        # rows a block: enough to keep a GPU busy, few enough for a core's cache
        block = max(16, (40_000_000 if student.is_cuda else 600_000) // student.shape[1] ** 2)
        tiny = torch.finfo(student.dtype).tiny
        total = student.new_zeros(())
        ctx.gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), block):
            rows = slice(start, start + block)
            _, q = soft_sort(teacher[rows], teacher_steepness, kind)
            with torch.set_grad_enabled(ctx.gradient is not None):
                x = student[rows].detach().requires_grad_(ctx.gradient is not None)
                _, p = soft_sort(x, steepness, kind)
                loss = (q * p.clamp_min(tiny).log()).sum() / -student.numel()
            if ctx.gradient is not None:
                (ctx.gradient[rows],) = torch.autograd.grad(loss, x)
            total += loss.detach()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return grad * ctx.gradient, None, None, None, None


def cosine_similarities(features: Tensor, references: Tensor) -> Tensor:
    """Cosines (B, N, R) of features (B, N, D) and references (B, R, D), float32 or float64."""
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        features = F.normalize(features.to(dtype), dim=-1)
        references = F.normalize(references.to(dtype), dim=-1)
        return features @ references.transpose(1, 2)


def neco_loss(
    student: Tensor,
    teacher: Tensor,
    references: Tensor,
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
    kind: str = "bitonic",
) -> Tensor:
    """Patch neighbor consistency: the student must rank the references as the teacher does.

    Args:
        student: patch features (B, N, D) that are trained. Need not be normalised.
        teacher: features (B, N, D) of the same places in another view; gets no gradient.
        references: R patches to rank for each image, (B, R, D); get no gradient.
        steepness: of the student's sorting network, and the teacher's unless given.
        teacher_steepness: above `steepness`, it sharpens the target.
        kind: `bitonic` or `odd_even`.

    Returns:
        -(Q * log P).sum(ranks).mean(patches, items), with Q the teacher's soft permutation and P
        the student's: a float32 scalar, float64 for float64 features. Its floor is the entropy of
        Q, `neco_loss(teacher, teacher, references, teacher_steepness)`. Where P is uniform it is
        log R.

    Raises:
        ValueError: shapes that do not fit, a steepness that is not positive, an unknown kind.

    Source: Pariza et al., arXiv 2408.11054, section 3 ("patch neighbor consistency").
    """
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (B, N, D)"
        )
    if references.ndim != 3 or references.shape[::2] != student.shape[::2]:
        raise ValueError(
            f"references {tuple(references.shape)} must be (B, R, D) for features "
            f"{tuple(student.shape)}"
        )
    references = references.detach()
    return RankingLoss.apply(
        cosine_similarities(student, references).flatten(0, 1),
        cosine_similarities(teacher.detach(), references).flatten(0, 1),
        steepness,
        steepness if teacher_steepness is None else teacher_steepness,
        kind,
    )


def rank_agreement(student: Tensor, teacher: Tensor, references: Tensor) -> Tensor:
    """Mean Spearman correlation of both rankings of the references, -1 to 1; 0 if unrelated.

    Takes the features of `neco_loss`. Ranks are hard: this is for the eye, not for training.
    """
    ranks = [
        cosine_similarities(features, references).argsort(-1).argsort(-1).float()
        for features in (student, teacher)
    ]
    r = references.shape[1]
    return 1 - 6 * (ranks[0] - ranks[1]).square().sum(-1).mean() / max(r * (r * r - 1), 1)


# --------------------------------------------------------------------------------------- views
# Two global and some local crops of each image, with their boxes in image pixels. A worker draws
# and resizes them; colours are changed later, on the device, for a whole batch of crops at once.

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
GREY = (0.299, 0.587, 0.114)  # luma of R, G, B
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def load_image(path: str) -> Image.Image:
    """Read an image file of any mode as RGB; 16-bit values keep their upper 8 bits."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # Pillow would cut them off at 255
            values = np.asarray(image).astype(np.int64) // 256
            return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def random_box(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> Box:
    """Draw the box of a random resized crop: a share `scale` of the area, aspect ratio 3/4 to 4/3.

    As in torchvision, an image in which ten draws do not fit gets a central box of legal ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def overlap_area(a: Box, b: Box) -> int:
    """Area of the intersection of two boxes, in pixels."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def random_boxes(width: int, height: int, local_crops: int, rng: random.Random) -> list[Box]:
    """Draw the boxes of 2 global and then `local_crops` local crops of one image.

    A box is drawn again until it shares more than 2 % of the image (a local one 1 %) with each
    global box before it. On an image so small or elongated that 100 draws fail, the last one is
    moved over the middle of what the global boxes share: it always overlaps them.
    """
    boxes: list[Box] = []
    for crop in range(2 + local_crops):
        scale, share = ((0.25, 1.0), 0.02) if crop < 2 else ((0.05, 0.25), 0.01)
        before = boxes[:2]
        for _ in range(100):
            box = random_box(width, height, scale, rng)
            if all(overlap_area(box, other) > share * width * height for other in before):
                break
        else:
            w, h = box[2] - box[0], box[3] - box[1]
            x = (max(b[0] for b in before) + min(b[2] for b in before)) // 2
            y = (max(b[1] for b in before) + min(b[3] for b in before)) // 2
            left = min(max(x - w // 2, 0), width - w)
            top = min(max(y - h // 2, 0), height - h)
            box = left, top, left + w, top + h
        boxes.append(box)
    return boxes


def random_colours(rng: random.Random) -> list[float]:
    """Draw the colour changes of one crop, as `change_colours` takes them."""
    jitter = rng.random() < 0.8
    order = rng.sample(range(4), 4)
    factors = [rng.uniform(0.2, 1.8) if jitter else 1.0 for _ in range(3)]
    hue = rng.uniform(-0.2, 0.2) if jitter else 0.0
    grey = rng.random() < 0.2
    sigma = rng.uniform(0.1, 2.0) if rng.random() < 0.5 else 0.0
    return [*order, *factors, hue, grey, sigma]


def make_views(
    image: Image.Image, global_size: int, local_size: int, local_crops: int, rng: random.Random
) -> dict[str, Tensor]:
    """Cut the crops of one image.

    Args:
        image: RGB, of any size.
        global_size, local_size: side of the crops in pixels.
        local_crops: how many, L.
        rng: source of all randomness.

    Returns:
        `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s), uint8; `boxes` (2 + L, 4) in
        image pixels (left, top, right, bottom); `colours` (2 + L, 10) for `change_colours`.

    Source: multi-crop (Caron et al., SwAV, 2020) with the sizes of the public NeCo recipe.
    """
    boxes = random_boxes(*image.size, local_crops, rng)
    crops = []
    for box, size in zip(boxes, [global_size] * 2 + [local_size] * local_crops):
        crop = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return {
        "global_crops": torch.stack(crops[:2]),
        "local_crops": torch.stack(crops[2:]) if local_crops else torch.empty(0, dtype=torch.uint8),
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "colours": torch.tensor([random_colours(rng) for _ in boxes]),
    }


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor so that the host need not wait: to a GPU from pinned memory."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants of R, G, B, (1, 3, 1, 1), copied to a device once: the host waits for that copy."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images (B, 3, H, W) in 0-1 by `shift` (B, 1, 1, 1) turns, -0.5 to 0.5."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    r, g, b = images.split(1, dim=1)
    sixth = torch.where(high == r, (g - b), torch.where(high == g, b - r, r - g))
    start = torch.where(high == r, 0.0, torch.where(high == g, 2.0, 4.0))
    hue = sixth / chroma.clamp_min(1e-8) + start + 6 * shift  # in sixths of the circle
    # channel = high - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + hue) mod 6, n = 5, 3, 1
    k = (hue + per_channel((5.0, 3.0, 1.0), hue.device)) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur images (B, 3, H, W) by a Gaussian of `sigma` (B, 1, 1, 1) pixels, at most 2."""
    b, c, h, w = images.shape
    offsets = torch.arange(-6, 7, device=images.device)  # three sigma and more
    kernel = torch.exp(-0.5 * (offsets / sigma.view(b, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (B * 3, 13)
    images = F.pad(images.reshape(1, b * c, h, w), (6, 6, 6, 6), mode="replicate")
    images = F.conv2d(images, kernel[:, None, None, :], groups=b * c)
    images = F.conv2d(images, kernel[:, None, :, None], groups=b * c)
    return images.view(b, c, h, w)


def change_colours(images: Tensor, colours: Tensor) -> Tensor:
    """Jitter, grey and blur a batch of crops, each in its own way, and normalise them.

    Args:
        images: uint8 (B, 3, H, W), on any device.
        colours: (B, 10) on the CPU: the order of the four jitters, factors of brightness, contrast
            and saturation, turn of the hue, whether grey, sigma of the blur in pixels (0: none).

    Returns:
        float32 (B, 3, H, W), of ImageNet mean and standard deviation.

    Source: ColorJitter(0.8, 0.8, 0.8, 0.2), RandomGrayscale and GaussianBlur of the public recipe.
    """
    device = images.device
    images = images.float() / 255

    def grey(x: Tensor) -> Tensor:
        return (x * per_channel(GREY, device)).sum(1, keepdim=True)

    jitters = [  # brightness, contrast, saturation, hue; and the values that change nothing
        (lambda x, f: (x * f).clamp(0, 1), 1.0),
        (lambda x, f: torch.lerp(grey(x).mean((2, 3), keepdim=True), x, f).clamp(0, 1), 1.0),
        (lambda x, f: torch.lerp(grey(x), x, f).clamp(0, 1), 1.0),
        (shift_hue, 0.0),
    ]
    order, values, is_grey, sigma = colours[:, :4], colours[:, 4:8], colours[:, 8], colours[:, 9]
    changes = [
        ((order[:, turn] == kind) & (values[:, kind] != neutral), jitter, values[:, kind])
        for turn in range(4)
        for kind, (jitter, neutral) in enumerate(jitters)
    ]
    changes += [(is_grey > 0, lambda x, _: grey(x), is_grey), (sigma > 0, blur, sigma)]
    for chosen, change, value in changes:
        rows = chosen.nonzero().squeeze(1)  # known on the CPU: a GPU need not be asked
        if len(rows):
            value = to_device(value[rows].view(-1, 1, 1, 1), device)
            rows = to_device(rows, device)
            images[rows] = change(images[rows], value)
    return (images - per_channel(MEAN, device)) / per_channel(STD, device)


def intersect(a: Tensor, b: Tensor) -> Tensor:
    """Intersection (B, 4) of boxes (B, 4) and (B, 4), as left, top, right, bottom."""
    return torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], dim=1)


def align(features: Tensor, crop: Tensor, region: Tensor, grid: int) -> Tensor:
    """Read grid x grid cells of a region of the image from the feature map of a crop.

    Args:
        features: maps (B, D, h, w) of the crops.
        crop: boxes (B, 4) of the crops in image pixels.
        region: boxes (B, 4) in image pixels, inside the crops. The same region read from two crops
            gives features of the same places, cell by cell.
        grid: cells a side.

    Returns:
        (B, grid * grid, D), row by row.

    Source: RoI-align (He et al., Mask R-CNN, 2017), as in arXiv 2408.11054, section 3.
    """
    h, w = features.shape[-2:]
    sides = crop[:, 2:] - crop[:, :2]
    corners = region.view(-1, 2, 2) - crop[:, None, :2]
    boxes = (corners / sides[:, None]).flatten(1)
    boxes[:, 0::2] *= w  # now in patches of the crop
    boxes[:, 1::2] *= h
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    cells = roi_align(features, torch.cat([index, boxes], dim=1), grid, aligned=True)
    return cells.flatten(2).transpose(1, 2)  # (B, D, grid, grid) -> (B, N, D)


def align_pairs(
    maps: list[Tensor], boxes: Tensor, pairs: list[tuple[int, int]], side: int, grid: int
) -> Tensor:
    """Read what both crops of each pair share, from the maps of one side of the pairs.

    Args:
        maps: feature maps (B, D, h, w), one for each crop, of any size.
        boxes: (B, crops, 4) in image pixels.
        pairs: P pairs of crops (g, v), g a global one and v any other.
        side: 0 to read from the maps of the crops g, 1 from those of the crops v.
        grid: cells a side.

    Returns:
        (P, B, grid * grid, D): cell k of side 0 and of side 1 show the same place.
    """
    cells = []
    for pair in pairs:
        shared = intersect(boxes[:, pair[0]], boxes[:, pair[1]])
        cells.append(align(maps[pair[side]], boxes[:, pair[side]], shared, grid))
    return torch.stack(cells)


def reference_order(pairs: int, size: int, batch: int, count: int, seed: int) -> Tensor:
    """Draw for each image of a batch, and each crop pair, `count` out of `size` patches.

    No image draws a patch twice. Within a crop pair, no two images draw the same patch while there
    are enough.

    Args:
        pairs: P, number of crop pairs.
        size: number of patches to draw from, at least `count`.
        batch: B, images of the whole batch.
        seed: the draw is a function of it, so that every process draws the same.

    Returns:
        Indices (P, B, count).
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(batch * count).view(batch, count) % size
    return torch.stack([torch.randperm(size, generator=generator)[places] for _ in range(pairs)])


def push(queue: Tensor, patches: Tensor, length: int) -> Tensor:
    """Append patches (2, K, D) to a first-in-first-out queue for each global crop.

    Args:
        queue: (2, N, D), the oldest first. It starts with N = 0: what it holds was stored.
        length: of the queue at most.

    Returns:
        The last `length` of both, (2, min(N + K, length), D).
    """
    return torch.cat([queue, patches], dim=1)[:, -length:].contiguous()


# ------------------------------------------------------------------------------------ training
# One step: the teacher reads the global crops, its patches feed the queue, references are drawn,
# the student reads all crops, and all crop pairs go through one loss. All randomness is a function
# of seed, step and sample: on a CPU neither workers nor an interruption change a bit of the result,
# and the number of processes changes it by rounding only.


def seed_of(*key) -> int:
    """A 63-bit seed that is a function of the key, alike on every machine."""
    return random.Random(repr(key)).getrandbits(63)


def find_images(root: str) -> np.ndarray:
    """List the image files below a folder, sorted, as an array of relative paths in bytes.

    One array of bytes takes a tenth of a list of strings, and worker processes share it.
    """
    start = len(os.path.join(root, ""))
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder that was read before, or to one above
            folders.clear()
            continue
        seen.add(place)
        paths = (os.path.join(folder, name) for name in names)
        found += [os.fsencode(p[start:]) for p in paths if p.lower().endswith(IMAGE_TYPES)]
    return np.array(sorted(found))


class CropDataset(Dataset):
    """Sample i of the whole training: the crops of image i of an endless row of shuffled epochs.

    An image that cannot be read is replaced by another one, and named under `unreadable`.
    """

    def __init__(self, args: argparse.Namespace, files: np.ndarray, per_epoch: int):
        self.args, self.files, self.per_epoch = args, files, per_epoch
        self.epoch, self.order = -1, None

    def path(self, index: int) -> str:
        return os.path.join(self.args.data, os.fsdecode(self.files[index]))

    def __getitem__(self, i: int) -> dict:
        args = self.args
        epoch, place = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            shuffle = np.random.default_rng(seed_of(args.seed, "epoch", epoch))
            self.epoch, self.order = epoch, shuffle.permutation(len(self.files)).astype(np.int32)
        rng = random.Random(seed_of(args.seed, "sample", i))
        index, unreadable = self.order[place], []
        while len(unreadable) < 100:
            try:
                image = load_image(self.path(index))
                break
            except Exception as error:  # Pillow raises many kinds; the caller names each file
                unreadable.append((self.path(index), str(error) or type(error).__name__))
                index = rng.randrange(len(self.files))
        else:
            raise InputError(
                f"--data {args.data}: 100 of its images in a row cannot be read, the last being "
                f"{unreadable[-1][0]} ({unreadable[-1][1]})"
            )
        views = make_views(image, args.global_size, args.local_size, args.local_crops, rng)
        return views | {"unreadable": unreadable}


def collate(samples: list[dict]) -> dict:
    """Stack the samples of a batch; their unreadable files become one list."""
    unreadable = [item for sample in samples for item in sample.pop("unreadable")]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    return batch | {"unreadable": unreadable}


def start_worker(_: int) -> None:
    """Leave Ctrl-C and SIGTERM to the process that can save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Network(nn.Module):
    """Backbone and head: crops (B, 3, H, W) -> L2-normalised embeddings (B, 256, h, w), float32."""

    def __init__(self, backbone: nn.Module, hidden: int = 2048, out: int = 256):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(backbone.embed_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, out),
        )
        for layer in self.head[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, crops: list[Tensor], noise: list[Tensor] | None = None) -> list[Tensor]:
        """Embed each batch of crops; its noise (2 * depth, B) is for the hooks of add_drop_path."""
        maps = []
        for i, images in enumerate(crops):
            self.backbone.noise = noise[i] if noise else None
            tokens = self.backbone(images).permute(0, 2, 3, 1)
            maps.append(F.normalize(self.head(tokens).float(), dim=-1).permute(0, 3, 1, 2))
        return maps


PATCHES_PER_IMAGE = 10  # that a step adds to the queue of each global crop


def add_drop_path(backbone: nn.Module, rate: float = 0.1) -> int:
    """Make a vision transformer drop residual branches, more often the deeper they are.

    Each branch (`attn` and `mlp` of every one of `model.blocks`) is dropped for an image where its
    row of `backbone.noise` (2 * depth, B), uniform in 0-1, is below a rate that grows from 0 to
    `rate` with depth. The noise comes from outside so that it is a function of seed and sample.

    Returns:
        Number of rows of noise; 0 for a backbone without such blocks, which then drops nothing.

    Source: Huang et al., "Deep networks with stochastic depth", 2016.
    """
    backbone.noise = None
    blocks = getattr(backbone.model, "blocks", [])
    blocks = [block for block in blocks if hasattr(block, "attn") and hasattr(block, "mlp")]
    branches = [branch for block in blocks for branch in (block.attn, block.mlp)]

    def drop(row: int, share: float, module: nn.Module, _, output):
        if backbone.noise is None or not module.training:
            return output
        kept = (backbone.noise[row] >= share)[:, None, None] / (1 - share)
        if isinstance(output, tuple):  # DINO's attention also returns its weights
            return output[0] * kept.to(output[0].dtype), *output[1:]
        return output * kept.to(output.dtype)

    for row, branch in enumerate(branches):
        share = rate * (row // 2) / max(len(blocks) - 1, 1)
        branch.register_forward_hook(functools.partial(drop, row, share))
    return len(branches)


def cosine(start: float, end: float, progress: float) -> float:
    """Cosine schedule from start (progress 0) to end (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(network: Network, lr: float, head_lr: float) -> list[dict]:
    """Four groups for AdamW: backbone and head, each with and without weight decay.

    Biases and one-dimensional parameters do not decay. `base_lr` is what the schedule starts at.
    """
    groups = []
    for module, base_lr in ((network.backbone, lr), (network.head, head_lr)):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for decays in (True, False):
            part = [p for name, p in named if (p.ndim > 1 and not name.endswith("bias")) == decays]
            groups.append({"params": part, "base_lr": base_lr, "decays": decays})
    return groups


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for mine, other in zip(teacher.buffers(), student.buffers()):
        mine.copy_(other)


class Trainer:
    """State of a training, and the step that advances it.

    Every process of a distributed run holds the same state and works on its share of each batch.
    """

    def __init__(self, backbone: Backbone, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.step = args, device, 0
        distributed = dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        # one backbone, but each head starts at random by itself, as in the public code
        self.teacher = Network(copy.deepcopy(backbone), args.hidden).to(device)
        self.teacher.requires_grad_(False).eval()
        self.student = Network(backbone, args.hidden).to(device)
        self.noise_rows = add_drop_path(self.student.backbone)
        groups = parameter_groups(self.student, args.lr, args.head_lr)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.queue = torch.empty(2, 0, 256, device=device)
        self.pairs = [(g, v) for g in range(2) for v in range(2 + args.local_crops) if v != g]
        self.host_loss = torch.zeros((), pin_memory=device.type == "cuda")
        if args.compile:
            self.student.compile()
            self.teacher.compile()
        self.parallel = self.student
        if distributed:
            # a static graph may leave parameters without gradient, such as DINOv2's mask token
            self.parallel = nn.parallel.DistributedDataParallel(self.student, static_graph=True)
            self.cpu_group = dist.new_group(backend="gloo")

    def state(self) -> dict:
        """All that is needed to go on, as tensors and plain values."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "queue": self.queue,
        }

    def load_state(self, state: dict) -> None:
        """Go on from what `state` returned, in this or another process."""
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.queue = state["queue"].to(self.device)

    def mean(self, values: Tensor) -> list[float]:
        """Mean of some values over all ranks; waits for the device."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return (values / self.ranks).tolist()

    def highest(self, value: int) -> int:
        """Highest value on any rank, so that all ranks stop at the same step."""
        if self.ranks > 1:
            values = torch.tensor(value)
            dist.all_reduce(values, dist.ReduceOp.MAX, self.cpu_group)
            value = int(values)
        return value

    def gather(self, patches: Tensor) -> Tensor:
        """Patches (2, b, K, D) of all ranks, in the order of the batch: (2, B, K, D)."""
        if self.ranks == 1:
            return patches
        parts = [torch.empty_like(patches) for _ in range(self.ranks)]
        dist.all_gather(parts, patches.contiguous())
        return torch.cat(parts, dim=1)

    def train_step(self, batch: dict, measure: bool) -> Tensor:
        """Advance by one optimiser step on this rank's images of a batch.

        Returns loss, floor and agreement (3,) of these images; the latter two only if `measure`.
        Raises FloatingPointError, before the weights are updated, if the loss is not finite.
        """
        args, device = self.args, self.device
        share = args.batch_size // self.ranks
        mine = slice(self.rank * share, (self.rank + 1) * share)
        autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")

        # Random numbers are drawn for the whole batch, whoever works on which part of it.
        seed = seed_of(args.seed, "step", self.step)
        generator = torch.Generator().manual_seed(seed)
        crops, references = 2 + args.local_crops, args.grid**2  # how many
        patches = (args.global_size // self.student.backbone.patch_size) ** 2
        noise = torch.rand(self.noise_rows, args.batch_size, crops, generator=generator)[:, mine]
        scores = torch.rand(2, args.batch_size, patches, generator=generator)
        stored = self.queue.shape[1] + PATCHES_PER_IMAGE * args.batch_size  # before it is cut
        count = min(PATCHES_PER_IMAGE if stored >= references else references, patches)
        places = to_device(scores.topk(count).indices[:, mine], device)

        # Accumulation: a batch in parts, each with its crops, their noise, and the boxes. Crops,
        # colours and noise run image by image, and crop by crop within an image.
        parts = []
        for first in range(0, share, share // args.accumulate):
            rows = slice(first, first + share // args.accumulate)
            views, noises = [], []
            sizes = [("global_crops", slice(0, 2)), ("local_crops", slice(2, crops))]
            for name, which in sizes if args.local_crops else sizes[:1]:
                images = to_device(batch[name][rows], device).flatten(0, 1)  # (b * crops, 3, H, W)
                views.append(change_colours(images, batch["colours"][rows, which].flatten(0, 1)))
                noises.append(to_device(noise[:, rows, which].flatten(1), device))
            parts.append((views, noises, to_device(batch["boxes"][rows], device)))

        # Teacher: the cells to rank, and random patches of every image for the queue.
        targets, samples = [], []
        for (views, _, boxes), at in zip(parts, places.chunk(len(parts), dim=1)):
            with torch.no_grad(), autocast:
                maps = self.teacher(views[:1])[0].unflatten(0, (len(boxes), 2)).unbind(1)
            targets.append(align_pairs(maps, boxes, self.pairs, 0, args.grid))
            flat = torch.stack(maps).flatten(3).transpose(2, 3)  # (2, b, h * w, D)
            samples.append(flat.gather(2, at[..., None].expand(-1, -1, -1, flat.shape[3])))
        samples = self.gather(torch.cat(samples, dim=1))  # (2, B, count, D)
        new = samples[:, :, :PATCHES_PER_IMAGE].flatten(1, 2)
        self.queue = push(self.queue, new, args.queue)
        # while the queue holds too little, the current batch is drawn from
        pool = self.queue if self.queue.shape[1] >= references else samples.flatten(1, 2)
        order = reference_order(len(self.pairs), pool.shape[1], args.batch_size, references, seed)
        order = to_device(order[:, mine], device)
        drawn = torch.stack([pool[g, order[k]] for k, (g, _) in enumerate(self.pairs)])

        # Student: all crops, one loss over all pairs.
        self.optimizer.zero_grad()
        measures = torch.zeros(3, device=device)
        drawn = drawn.chunk(len(parts), dim=1)
        for (views, noises, boxes), target, reference in zip(parts, targets, drawn):
            with autocast:
                maps = self.parallel(views, noises)
            maps = [m for same in maps for m in same.unflatten(0, (len(boxes), -1)).unbind(1)]
            cells = align_pairs(maps, boxes, self.pairs, 1, args.grid).flatten(0, 1)
            target, reference = target.flatten(0, 1), reference.flatten(0, 1)
            loss = neco_loss(
                cells, target, reference, args.steepness, args.teacher_steepness, args.sorting
            ) / len(parts)
            measures[0] += loss.detach()
            if measure:
                floor = neco_loss(
                    target, target, reference, args.teacher_steepness, kind=args.sorting
                )
                agreement = rank_agreement(cells.detach(), target, reference)
                measures[1:] += torch.stack([floor, agreement]) / len(parts)
            # the check below waits for this copy only, while the GPU works on the backward pass
            self.host_loss.copy_(measures[0], non_blocking=True)
            copied = torch.cuda.Event() if device.type == "cuda" else None
            if copied:
                copied.record()
            loss.backward()
        if copied:
            copied.synchronize()
        if self.highest(not math.isfinite(self.host_loss)):
            raise FloatingPointError

        progress = self.step / args.steps
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(group["base_lr"], 0, progress)
            group["weight_decay"] = cosine(*args.weight_decay, progress) if group["decays"] else 0.0
        self.optimizer.step()
        update_teacher(self.teacher, self.student, cosine(args.momentum, 1, progress))
        self.step += 1
        return measures


@contextlib.contextmanager
def writing(path: Path):
    """Turn a failed write into the end of the run, with a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise SystemExit(
            f"neco.py: cannot write {path} ({error}); what was saved before is kept: make room, "
            "then the same command goes on from there"
        ) from error


def plain(value):
    """Copy nested containers with strings interned, so that equal content pickles to equal bytes.

    Pickle writes a string once and refers back to it where it meets the same object again; strings
    of a loaded checkpoint are other objects than those of this program.
    """
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def save(path: Path, content: dict | str) -> None:
    """Write a file by way of a temporary name, so that the old or the new one is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                if isinstance(content, str):
                    file.write(content.encode())
                else:
                    torch.save(plain(content), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


CHECKPOINT = ("step", "student", "teacher", "optimizer", "queue", "settings", "unreadable")


def read_checkpoint(path: Path, settings: dict) -> dict | None:
    """Read the checkpoint of a run with the same settings; None if there is none."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(checkpoint, dict) and checkpoint.keys() >= set(CHECKPOINT)):
            raise KeyError("a part is missing")
        before = checkpoint["settings"].copy()
    except Exception as error:  # torch.load raises many kinds on a file that is not its own
        raise InputError(
            f"--out: {path} is broken or no checkpoint of neco.py: move it away, or give another "
            "folder"
        ) from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(
                f"--out: the run in {path.parent} has {name} {before.get(name)}, not {value}: give "
                "the same settings to go on with it, or another folder"
            )
    return checkpoint


LOG_COLUMNS = ["step", "loss", "floor", "agreement", "lr", "weight_decay"]


def start_log(path: Path, step: int) -> None:
    """Begin log.csv, or cut it back to the rows up to `step`, from where a resumed run goes on."""
    rows = path.read_text().splitlines()[1:] if step and path.exists() else []
    rows = [row.split(",") for row in rows]
    kept = [r for r in rows if len(r) == len(LOG_COLUMNS) and r[0].isdigit() and int(r[0]) <= step]
    save(path, "".join(",".join(row) + "\n" for row in [LOG_COLUMNS, *kept]))


def train(args: argparse.Namespace, backbone: Backbone, files: np.ndarray) -> int:
    """Train from the start or from args.out/checkpoint.pth, and return the exit status.

    Writes checkpoint.pth, student.pth, teacher.pth and log.csv into args.out. Ctrl-C and SIGTERM
    end it after the step under way, saved, with status 130 and 143.
    """
    out, device = Path(args.out), torch.device(args.device)
    steps_per_epoch = len(files) // args.batch_size
    args.steps = args.steps or args.epochs * steps_per_epoch
    trainer = Trainer(backbone, args, device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["images"] = f"{len(files)} ({zlib.crc32(files.tobytes()):08x})"
    unreadable = set()
    if checkpoint := read_checkpoint(out / "checkpoint.pth", settings):
        trainer.load_state(checkpoint)
        unreadable.update(checkpoint["unreadable"])
    first, talks, terminal = trainer.step, trainer.rank == 0, sys.stdout.isatty()

    def save_all() -> None:
        if talks:
            state = trainer.state() | {"settings": settings, "unreadable": sorted(unreadable)}
            save(out / "checkpoint.pth", state)
            for name in ("student", "teacher"):
                save(out / f"{name}.pth", getattr(trainer, name).backbone.model.state_dict())

    share = args.batch_size // trainer.ranks
    starts = range(first * args.batch_size, args.steps * args.batch_size, args.batch_size)
    starts = (start + trainer.rank * share for start in starts)
    loader = DataLoader(
        CropDataset(args, files, steps_per_epoch * args.batch_size),
        batch_sampler=(range(start, start + share) for start in starts),
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        # forked workers share the list of files and the libraries; elsewhere the platform decides
        multiprocessing_context="fork" if args.workers and sys.platform == "linux" else None,
    )
    if talks:
        if args.demo and not first:
            save(out / "start.pth", backbone.model.state_dict())
        start_log(out / "log.csv", first)
        parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
        print(
            f"NeCo: {args.backbone} ({parameters:.1f} M parameters) on {len(files)} images of "
            f"{args.data}\nsteps {first} to {args.steps} of {args.batch_size} images, 2 x "
            f"{args.global_size} and {args.local_crops} x {args.local_size} px; {device}, "
            f"{args.precision}, {trainer.ranks} process{'es' * (trainer.ranks > 1)}"
            + ("" if trainer.noise_rows else "; no drop path (the backbone has no blocks)"),
            flush=True,
        )
    signals = [0]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))

    begun, flattened, stopped = time.monotonic(), False, 0
    for batch in loader:
        for path, reason in batch["unreadable"]:
            if path not in unreadable:
                print(f"neco.py: skipped {path}, which cannot be read: {reason}", file=sys.stderr)
                unreadable.add(path)
        step = trainer.step + 1
        measured = step % args.log_every == 0 or step in (1, args.steps)
        try:
            measures = trainer.train_step(batch, measured)
        except FloatingPointError as error:
            raise SystemExit(
                f"neco.py: the loss is not finite at step {step}; the weights did not take it, and "
                f"the last checkpoint stays in {out}: try a lower --lr and --head-lr"
            ) from error
        if measured:
            loss, floor, agreement = trainer.mean(measures)
        if measured and talks:
            decayed = trainer.optimizer.param_groups[0]
            row = loss, floor, agreement, decayed["lr"], decayed["weight_decay"]
            with writing(out / "log.csv"), open(out / "log.csv", "a") as log:
                log.write(",".join([str(step), *(f"{value:.6g}" for value in row)]) + "\n")
            pace = (time.monotonic() - begun) / (step - first)
            left = datetime.timedelta(seconds=round((args.steps - step) * pace))
            print(
                f"{chr(13) * terminal}step {step}/{args.steps}  loss {loss:.3f}  floor {floor:.3f}"
                f"  agreement {agreement:.2f}  {args.batch_size / pace:.1f} images/s  {left} left ",
                end="" if terminal else "\n",
                flush=True,
            )
            uniform = math.log(args.grid**2)
            if floor > 0.95 * uniform and not flattened:
                flattened = True
                print(
                    f"\nneco.py: warning: the teacher's rankings are nearly uniform (floor "
                    f"{floor:.2f} of at most {uniform:.2f}): the features may be collapsing. Try a "
                    "lower --lr and --head-lr, a --momentum nearer to 1, or a --teacher-steepness "
                    "above --steepness",
                    file=sys.stderr,
                )
        if stopped := trainer.highest(signals[-1]):
            break
        if step % args.save_every == 0 and step < args.steps:
            save_all()
    save_all()
    if talks:
        print(
            "\n" * terminal
            + f"stopped at step {trainer.step}, the same command goes on from here; "
            * bool(stopped)
            + f"wrote student.pth, teacher.pth, checkpoint.pth and log.csv to {out}"
            + f"; {len(unreadable)} images could not be read" * bool(unreadable)
        )
    return 128 + stopped if stopped else 0


# -------------------------------------------------------------------------------- command line
# Every default is the paper's recipe. What is wrong with the input is said in one sentence on
# stderr, with exit status 2. The demo at the end makes images to try it all on.


def number(kind: type, low: float, high: float = math.inf):
    """Make an argparse type: a finite number of a kind, from low to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):  # nor is nan
            limit = f"from {low:g}" + f" to {high:g}" * math.isfinite(high)
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {limit}")
        return value

    return parse


WHOLE, POSITIVE, SIDE = number(int, 1, 10**9), number(float, 1e-9), number(int, 1, 10_000)
FLAGS = [  # name, type or choices, default, help
    ("data", str, None, "folder of images, searched recursively; no labels needed"),
    ("out", str, "runs/neco", "folder for the results; a run in it is resumed"),
    ("backbone", str, "dinov2_vits14_reg", f"{', '.join(BACKBONES)}, or any of --hub"),
    ("hub", str, None, "owner/repo[:ref] or local folder with hubconf.py; its code is run"),
    ("weights", str, None, "state dict to start from, instead of the hub's weights"),
    ("epochs", WHOLE, 25, "passes over the images"),
    ("steps", WHOLE, None, "number of steps, instead of epochs; the schedules span it"),
    ("batch-size", WHOLE, 64, "images a step, over all processes"),
    ("accumulate", WHOLE, 1, "work on a batch in so many parts, to save memory; same loss"),
    ("global-size", SIDE, 518, "side of the 2 global crops, a multiple of the patch size"),
    ("local-size", SIDE, 98, "side of the local crops, likewise"),
    ("local-crops", number(int, 0, 100), 4, "local crops an image"),
    ("grid", number(int, 2, 1000), 7, "N x N cells of a crop pair rank N x N references"),
    ("queue", number(int, 1, 10**7), 8192, "teacher patches to draw from, at least N x N"),
    ("hidden", WHOLE, 2048, "width of the head; less for a small backbone"),
    ("lr", POSITIVE, 1e-5, "learning rate of the backbone; a far higher one collapses"),
    ("head-lr", POSITIVE, 1e-4, "learning rate of the head"),
    ("weight-decay", number(float, 0), [0.04, 0.5], "of AdamW, at the start and at the end"),
    ("momentum", number(float, 0, 1), 0.9995, "of the teacher at the start; 1 at the end"),
    ("steepness", POSITIVE, 100.0, "of the sorting network; the higher, the harder the sort"),
    ("teacher-steepness", POSITIVE, None, "as --steepness; a higher one works against collapse"),
    ("sorting", ("bitonic", "odd_even"), "bitonic", "sorting network: bitonic or odd_even"),
    ("workers", number(int, 0, 1024), min(16, os.cpu_count() or 1), "processes that read images"),
    ("device", str, None, "cpu, cuda or cuda:N; cuda where there is one"),
    ("precision", ("bf16", "fp32"), None, "of the networks: bf16 on a GPU, fp32 on a CPU"),
    ("seed", number(int, 0, 2**63 - 1), 0, "of all that is random"),
    ("log-every", WHOLE, 50, "steps between lines of progress and rows of log.csv"),
    ("save-every", WHOLE, 1000, "steps between checkpoints"),
]
# A run that goes on may have other values of these.
FREE = ("data", "out", "epochs", "workers", "device", "log_every", "save_every")
SETTINGS = [name.replace("-", "_") for name, *_ in FLAGS if name.replace("-", "_") not in FREE]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; raise InputError where a value is wrong or two do not go together."""
    parser = argparse.ArgumentParser(
        "neco.py",
        usage="neco.py --data FOLDER [options]",
        description=__doc__.split("\n\n")[2]
        + "\n    torchrun --nproc-per-node 4 neco.py --data FOLDER",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, kind, default, text in FLAGS:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if isinstance(default, list):
            how["nargs"] = len(default)
        text += "" if default is None else " (%(default)s)"
        parser.add_argument(
            f"--{name}", default=default, help=text, metavar=name[:1].upper(), **how
        )
    parser.add_argument("--compile", action="store_true", help="compile the networks; slow start")
    parser.add_argument(
        "--demo", action="store_true", help="make small images and train tiny on them"
    )

    def error(message: str):
        raise InputError(message.removeprefix("argument "))

    parser.error = error
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if bool(args.data) == args.demo:
        raise InputError("give --data, a folder of images, or --demo, which makes its own")
    if args.queue < args.grid**2:
        raise InputError(
            f"--queue {args.queue} is less than the {args.grid**2} references of --grid"
        )
    args.teacher_steepness = args.teacher_steepness or args.steepness
    devices = torch.cuda.device_count()
    args.device = args.device or ("cuda" if devices else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", args.device) is None:
        raise InputError(f"--device {args.device} is not cpu, cuda or cuda:N")
    if args.device != "cpu" and (torch.device(args.device).index or 0) >= devices:
        raise InputError(f"--device {args.device}: there are {devices} CUDA devices here, give cpu")
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if args.demo and ranks > 1:
        raise InputError("--demo runs in one process: start it without torchrun")
    if args.batch_size % (ranks * args.accumulate):
        raise InputError(
            f"--batch-size {args.batch_size} is no multiple of --accumulate {args.accumulate}"
            + f" times {ranks} processes" * (ranks > 1)
        )
    return args


def check_images(args: argparse.Namespace) -> np.ndarray:
    """List the images of args.data; raise InputError if a run cannot start with them."""
    if not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: there is no such folder")
    files = find_images(args.data)
    if not len(files):
        raise InputError(f"--data {args.data}: no image in it ({', '.join(IMAGE_TYPES)})")
    if len(files) < args.batch_size:
        raise InputError(
            f"--data {args.data}: {len(files)} images are less than a batch, give --batch-size "
            f"{len(files)} or less"
        )
    for name in files:
        try:
            load_image(os.path.join(args.data, os.fsdecode(name)))
            break
        except Exception as error:  # one good image is enough: the training skips and names others
            reason = error
    else:
        raise InputError(f"--data {args.data}: none of {len(files)} images can be read ({reason})")
    return files


def make_out(folder: str) -> None:
    """Make the folder for the results; raise InputError if it cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror})") from error


DEMO = {  # small enough for two minutes on two cores
    "out": "runs/demo",
    "backbone": "tiny",
    "steps": 300,
    "batch_size": 8,
    "global_size": 98,
    "local_size": 42,
    "local_crops": 2,
    "grid": 3,
    "queue": 2048,
    "hidden": 128,
    "lr": 7e-4,
    "weight_decay": [0.04, 0.04],
    "momentum": 0.99,
    "steepness": 1000.0,
    "teacher_steepness": 4000.0,
    "workers": 0,
    "log_every": 20,
}


def write_demo_images(root: Path, size: int = 112) -> None:
    """Write textured shapes on textured ground, with masks: train/ and val/, images/ and masks/.

    The class is the texture: stripes in one of four directions, or checks. Its two colours, width,
    phase and a small turn are random, so that colour does not tell the class, and there is noise.
    """
    y, x = np.mgrid[:size, :size]
    for split, count in (("train", 320), ("val", 80)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng(seed_of(split, i))
            mask = Image.new("L", (size, size))
            draw = ImageDraw.Draw(mask)
            classes = rng.permutation(5)[:4].tolist()  # of the ground and of three shapes on it
            draw.rectangle((0, 0, size, size), classes[0])
            for label in classes[1:]:
                w, h = rng.integers(40, 71, 2).tolist()
                left, top = rng.integers(-10, (size - w + 11, size - h + 11)).tolist()
                shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
                shape((left, top, left + w, top + h), label)
            labels, image = np.array(mask), np.zeros((size, size, 3))
            for label in classes:
                angle = label % 4 * np.pi / 4 + rng.uniform(-0.15, 0.15)
                turned = (
                    x * np.cos(angle) + y * np.sin(angle),
                    y * np.cos(angle) - x * np.sin(angle),
                )
                period, phases = rng.uniform(7, 12), rng.uniform(0, 2 * np.pi, 2)
                waves = [np.sin(2 * np.pi * u / period + p) for u, p in zip(turned, phases)]
                pattern = waves[0] * waves[1] if label == 4 else waves[0]
                middle = rng.uniform(103, 153, 3)
                contrast = rng.uniform(25, 60) * rng.uniform(0.6, 1.4, 3)
                colours = np.where(pattern[..., None] > 0, middle + contrast, middle - contrast)
                image = np.where((labels == label)[..., None], colours, image)
            image += rng.normal(0, 30, (size, size, 1))
            image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            image.save(root / split / "images" / f"{i:03}.png")
            mask.save(root / split / "masks" / f"{i:03}.png")


def warm_up(backbone: Backbone, root: str, files: np.ndarray, seed: int, steps: int = 100) -> None:
    """Train random weights a little, image by image, so that NeCo has something to refine.

    Not part of NeCo, which starts from a pretrained backbone: this stands in for the pretraining
    (SimCLR, Chen et al., 2020). Each window of 28 x 28 pixels is an image of its own. Two of its
    views, moved by up to 7 pixels and in changed colours, should have a similar mean feature, and
    one unlike that of all other windows. No labels; all images must have one size.
    """
    size, shift, batch = 28, 7, 128
    torch.manual_seed(seed)
    rng = random.Random(seed)
    images = [np.array(load_image(os.path.join(root, os.fsdecode(name)))) for name in files]
    windows = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    windows = windows.unfold(2, size, 1).unfold(3, size, 1)  # (images, 3, rows, columns, 28, 28)
    head = nn.Sequential(
        *(nn.Linear(backbone.embed_dim, 128), nn.BatchNorm1d(128), nn.GELU()),
        *(nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False)),
    )
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    for step in range(steps):
        index = torch.randint(len(windows), (batch,)).repeat(2)
        place = torch.randint(windows.shape[2], (2, batch)).repeat(1, 2)
        place = place + torch.randint(-shift, shift + 1, place.shape)
        row, column = place.clamp(0, windows.shape[2] - 1)
        colours = torch.tensor([random_colours(rng) for _ in index])
        views = change_colours(windows[index, :, row, column], colours)
        z = F.normalize(head(backbone(views).mean((2, 3))), dim=1)
        logits = (z @ z.T / 0.2).fill_diagonal_(-1e4)
        loss = F.cross_entropy(logits, torch.arange(2 * batch).roll(batch))  # find the other view
        for group in optimizer.param_groups:
            group["lr"] = cosine(1e-3, 0, step / steps) * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        args = parse_arguments(argv)
        files = None if args.demo else check_images(args)
        torch.manual_seed(args.seed)
        backbone = load_backbone(args.backbone, args.hub, args.weights)
        sizes = [("--global-size", args.global_size), ("--local-size", args.local_size)]
        for flag, size in sizes if args.local_crops else sizes[:1]:
            if size % backbone.patch_size:
                raise InputError(
                    f"{flag} {size} is no multiple of {backbone.patch_size}, the patch size of "
                    f"{args.backbone}"
                )
        patches = args.batch_size * (args.global_size // backbone.patch_size) ** 2
        if patches < args.grid**2:
            raise InputError(
                f"--global-size {args.global_size} gives a batch {patches} patches, less than the "
                f"{args.grid**2} references of --grid {args.grid}"
            )
        make_out(args.out)
        if args.demo:
            args.data = os.path.join(args.out, "data", "train", "images")
            write_demo_images(Path(args.out, "data"))
            files = check_images(args)
            untrained = args.backbone == "tiny" and args.weights is None and args.hub is None
            if untrained and not Path(args.out, "checkpoint.pth").exists():
                print(
                    "The demo has no pretrained backbone; a short SimCLR warm-up stands in for it."
                )
                warm_up(backbone, args.data, files, args.seed)
        if "WORLD_SIZE" in os.environ:
            if args.device != "cpu":
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
        status = train(args, backbone, files)
        if dist.is_initialized():
            dist.destroy_process_group()
        if args.demo and not status:
            more = "" if args.out == DEMO["out"] else f" --data {args.out}"
            print(f"next: python eval_seg.py --demo{more}")
        return status
    except InputError as error:
        # a worker of the loader wraps its traceback around the sentence, which comes last
        sentence = str(error).rpartition("InputError: ")[2].strip()
        print(f"neco.py: error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
