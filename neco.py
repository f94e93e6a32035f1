# SPDX-License-Identifier: MIT
"""NeCo (Patch Neighbor Consistency, arXiv 2408.11054, ICLR 2025) in one file.

NeCo post-trains a pretrained vision transformer on unlabelled images, so that its patch features
serve dense tasks better. Student and teacher see different crops of one image. Two patches that
show the same place, one of each, are compared with the same reference patches, drawn at random
from a queue of teacher patches, and the student learns to rank these references by similarity as
the teacher does: a whole order of neighbours says more than one match, and it should not depend on
crop and colour. A differentiable sorting network turns similarities into rankings.

    python neco.py --data coco/train2017                              # the paper's recipe
    python neco.py --data photos --steps 2000 --batch-size 16         # a shorter run
    torchrun --nproc-per-node 4 neco.py --data coco/train2017         # on four GPUs

The file reads as the paper does. Its parts can be copied: `soft_sort` with `sorting_network`;
`neco_loss` with these two and `RankingLoss`; `make_views` with `random_boxes`, `change_colours` and
`GLOBAL_CROPS`; `align` alone.
"""

import argparse
import copy
import functools
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

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

HUBS = {  # by the beginning of a backbone's name
    "dinov2_": "facebookresearch/dinov2",
    "dinov3_": "facebookresearch/dinov3",  # weights on request only: give them by --weights
    "dino_": "facebookresearch/dino:main",
}


class TinyViT(nn.Module):
    """A small vision transformer for trials: DINOv2's patch size and interface, random weights."""

    patch_size = 14

    def __init__(self, embed_dim: int = 64, depth: int = 3, heads: int = 2):
        super().__init__()
        self.embed_dim = embed_dim
        patches = nn.Conv2d(3, 24, 5, 2, 2), nn.GELU(), nn.Conv2d(24, embed_dim, 7, 7)
        self.patch_embed = nn.Sequential(*patches)  # a stem of two layers learns textures sooner
        layer = functools.partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True)
        blocks = (layer(embed_dim, heads, 4 * embed_dim, 0.0, "gelu") for _ in range(depth))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(embed_dim)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        tokens = self.patch_embed(images).flatten(2).mT  # (B, h * w, D); textures need no positions
        return [self.norm(self.blocks(tokens))]


class Backbone(nn.Module):
    """Patch features of a hub model: images (B, 3, H, W) -> (B, D, H / p, W / p)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.embed_dim = model, model.embed_dim
        self.patch_size = getattr(model, "patch_size", None) or model.patch_embed.patch_size

    def forward(self, images: Tensor) -> Tensor:
        h, w = (side // self.patch_size for side in images.shape[-2:])
        tokens = self.model.get_intermediate_layers(images, 1)[0]  # in DINO with the class token
        return tokens[:, -h * w :].mT.unflatten(2, (h, w))  # (B, h * w, D) -> (B, D, h, w)

    def checked_size(self, flag: str, asked: int | None, default: int) -> int:
        """The side of images, as asked or by default, in pixels: a multiple of the patch size."""
        size = default // self.patch_size * self.patch_size if asked is None else asked
        if size < 1 or size % self.patch_size:
            raise InputError(f"{flag} {size}: give a multiple of the patch size, {self.patch_size}")
        return size


def load_backbone(
    name: str = "dinov2_vits14_reg", hub: str | None = None, weights: str | None = None
) -> Backbone:
    """Load a hub model as a module from images to a map of patch features.

    Args:
        name: entry point of the hub, or `tiny` for the small random one of this file.
        hub: `owner/repo[:ref]` on GitHub, whose code is run, or a local folder with a hubconf.py.
            Default: the one in HUBS.
        weights: file or URL of a state dict instead of the hub's: of this project, of the model's
            authors, or a published NeCo checkpoint. Its head is left out, all else must match.

    Returns:
        A module with `patch_size` p, `embed_dim` D and `forward(images)`: ImageNet-normalised
        images (B, 3, H, W), H and W multiples of p, to features (B, D, H/p, W/p). In training
        mode it drops residual branches (drop path 0.1) if the hub's entry point offers that.

    Raises:
        InputError: the name is unknown, the hub out of reach, or the weights do not fit.
    """
    hub = hub or next((HUBS[start] for start in HUBS if name.startswith(start)), None)
    if hub is None and name != "tiny":
        known = ", ".join(f"{start}*" for start in HUBS)
        raise InputError(f"--backbone {name}: give one of {known}, tiny, or its hub by --hub")
    try:
        source = "local" if hub and Path(hub).is_dir() else "github"
        options = {"source": source, "trust_repo": True, "pretrained": weights is None}
        try:
            model = torch.hub.load(hub, name, drop_path_rate=0.1, **options) if hub else TinyViT()
        except TypeError:  # an entry point without drop path
            model = torch.hub.load(hub, name, **options)
    except Exception as error:  # the network, and the code of the hub, may raise anything
        advice = "give owner/repo or a folder with hubconf.py; without a network also --weights"
        raise InputError(f"--hub {hub} cannot build {name} ({error}): {advice}") from error
    if weights is not None:
        load = torch.hub.load_state_dict_from_url if "://" in weights else torch.load
        try:
            state = load(weights, map_location="cpu", weights_only=True)
            state, own = state.get("state_dict", state), model.state_dict()
            heads = ("projection_head.", "head.", "dino_head.", "ibot_head.")
            state = {k: state[k] for k in state if k in own or not k.startswith(heads)}
            model.load_state_dict(state)
        except Exception as error:  # torch.load raises errors of many kinds
            raise InputError(f"--weights {weights} is not of {name}: {str(error)[:300]}") from error
    return Backbone(model).train()


# ------------------------------------------------------------------------------------- sorting
# A sorting network compares fixed pairs of wires, layer by layer, and swaps what is out of order.
# Relaxed, a comparator mixes its two wires instead. Mixing the rows of the identity in the same
# way gives a soft permutation: the probability of each item to take each rank.


@functools.cache
def sorting_network(n: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return the bitonic sorting network of n >= 1 wires as a list of stages.

    Stage k = 0, 1, ... merges pairs of sorted blocks of 2^k wires. It is a tensor (k + 1, n): entry
    [layer, i] is the wire that wire i is compared with, or i itself where it is left alone. The
    smaller value always goes to the lower wire.

    Source: Batcher, "Sorting networks and their applications", 1968. A merge into blocks of S wires
    compares wire i with its mirror image in the block, i XOR (S - 1), which replaces reversing one
    half, and then with i XOR S/4, S/8, ..., 1. If n is no power of two, think of smallest elements
    in front, up to the next one: they never move, so they are left out.
    """
    stages, network = (n - 1).bit_length(), []
    front = 2**stages - n  # wires that are left out
    with torch.inference_mode(False):  # what is cached must serve training too
        wires = torch.arange(front, 2**stages, device=device)
        for stage in range(stages):
            masks = [2 ** (stage + 1) - 1] + [2**k for k in reversed(range(stage))]
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
    x = x.reshape(-1, n).T.contiguous()  # (n, rows): a gather copies whole rows
    permutation = x[:, None] * 0 + 1  # ones (n, columns, rows) that depend on x, also for n = 1
    network, wires = sorting_network(n, x.device), torch.arange(n, device=x.device)
    for stage, layers in enumerate(network):
        # So far a wire mixes items of its own block alone, and has a column for each of them: that
        # saves half the work. To merge two blocks the columns double, first those of the left block
        # and then those of the right one, with zeros where an item is of the other block. The last
        # stage drops the first columns, of the wires that are left out.
        block = (wires + 2 ** len(network) - n) >> stage
        right = (block & 1).to(x.dtype)[:, None, None]  # 1 in the second one of two blocks
        permutation = torch.cat([permutation * (1 - right), permutation * right], dim=1)[:, -n:]
        for partner in layers:
            # The sign is 1 on the lower wire and -1 on the upper: both get x_hi - x_lo.
            gap = (partner - wires).sign()[:, None] * (x.index_select(0, partner) - x)
            # atan2(1, z) / pi is 1/2 - atan(z) / pi, and keeps its digits where that is small.
            w = torch.atan2(torch.ones_like(x), gap * steepness) / math.pi  # (n, rows)
            x = torch.lerp(x, x.index_select(0, partner), w)
            permutation = torch.lerp(permutation, permutation.index_select(0, partner), w[:, None])
    return x.T.reshape(*lead, n), permutation.permute(2, 0, 1).reshape(*lead, n, n)


# ---------------------------------------------------------------------------------------- loss


class RankingLoss(torch.autograd.Function):
    """Cross-entropy of two soft permutations, from similarities (rows, R) to the references.

    Autograd stores dozens of R x R matrices for each row. As the loss is a mean, value and
    gradient are computed together, a block of rows at a time, and these are freed at once.
    """

    @staticmethod
    def forward(ctx, student, teacher, steepness: float, teacher_steepness: float) -> Tensor:
        # rows of a block: enough to keep a GPU busy, or few enough for a core's cache
        rows = max(1, (2**25 if student.is_cuda else 2**19) // student.shape[1] ** 2)
        total, gradients = student.new_zeros(()), []
        for x, y in zip(student.split(rows), teacher.split(rows), strict=True):
            _, Q = soft_sort(y, teacher_steepness)
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                _, P = soft_sort(x, steepness)
                log_P = P.clamp_min(torch.finfo(P.dtype).tiny).log()
                loss = -(Q * log_P).sum() / student.numel()
            gradients += torch.autograd.grad(loss, x)
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return grad * torch.cat(ctx.saved_tensors), None, None, None


def neco_loss(
    student: Tensor,
    teacher: Tensor,
    references: Tensor,
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
) -> Tensor:
    """Patch neighbor consistency: the student must rank the references as the teacher does.

    Args:
        student: patch features (..., N, D) that are trained. Need not be normalised.
        teacher: features (..., N, D) of the same places in another view; gets no gradient.
        references: the R patches that all N are compared with, (..., R, D); get no gradient.
        steepness: of the student's sorting network, and of the teacher's unless that is given.
        teacher_steepness: above `steepness`, it sharpens the target.

    Returns:
        -(Q * log P), summed over ranks and averaged over patches and items, with Q the teacher's
        soft permutation [rank, item] and P the student's: a scalar, float32, or float64 for float64
        features; differentiable once. It is the entropy of Q (its floor, at most log R) plus the
        divergence of P from Q, which is 0 where both rank alike.

    Raises:
        ValueError: student and teacher have different shapes.

    Source: Pariza et al., arXiv 2408.11054, section 3 ("patch neighbor consistency").
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)}, but teacher {tuple(teacher.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        parts = (student, teacher.detach(), references.detach())
        student, teacher, references = (F.normalize(part.to(dtype), dim=-1) for part in parts)
        cosines = [(part @ references.mT).flatten(0, -2) for part in (student, teacher)]
        return RankingLoss.apply(*cosines, steepness, teacher_steepness or steepness)


# --------------------------------------------------------------------------------------- views
# Two global and some local crops of each image, with their boxes in image pixels.

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
GLOBAL_CROPS = 2  # of an image
change_colours = v2.Compose(  # as in the public recipe
    [
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([lambda x: x.filter(GaussianBlur(0.1 + 1.9 * torch.rand(()).item()))], 0.5),
    ]
)


def read_image(path: str | Path) -> Tensor:
    """Read an image file of any mode, the right way up, as RGB: uint8 (3, H, W)."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def random_boxes(image: Tensor, local_crops: int) -> list[tuple[int, int, int, int]]:
    """Draw boxes (left, top, right, bottom in pixels) of 2 global crops, 25 to 100 % of the image,
    and of local ones, 5 to 25 %. A box is drawn again until it shares more than 2 % of the image (a
    local one 1 %) with each global box before it. Should 100 draws fail, on an elongated image, it
    is the whole image.
    """

    def overlap(a: tuple, b: tuple) -> int:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        return max(w, 0) * max(h, 0)

    (height, width), boxes = image.shape[-2:], []
    for crop in range(GLOBAL_CROPS + local_crops):
        scale, least = ((0.25, 1.0), 0.02) if crop < GLOBAL_CROPS else ((0.05, 0.25), 0.01)
        for _ in range(100):
            top, left, h, w = v2.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
            box = left, top, left + w, top + h
            if all(overlap(box, b) > least * height * width for b in boxes[:GLOBAL_CROPS]):
                break
        else:
            box = 0, 0, width, height
        boxes.append(box)
    return boxes


def make_views(image: Tensor, global_size: int, local_size: int, local_crops: int) -> dict:
    """Cut the crops of one image and change their colours; `torch.manual_seed` decides how.

    Args:
        image: uint8 (3, H, W), of any size.
        global_size, local_size: side of the crops in pixels, S and s.
        local_crops: how many, L.

    Returns:
        `crops`: global ones (2, 3, S, S) and, if there are any, local ones (L, 3, s, s), uint8;
        `boxes` (2 + L, 4): their places, left, top, right, bottom in image pixels.

    Source: multi-crop (Caron et al., SwAV, 2020) with the sizes of the public NeCo recipe.
    """
    boxes, crops = random_boxes(image, local_crops), []
    for i, (left, top, right, bottom) in enumerate(boxes):
        size = [global_size if i < GLOBAL_CROPS else local_size] * 2
        crop = v2.functional.resized_crop(image, top, left, bottom - top, right - left, size)
        crop = change_colours(v2.functional.to_pil_image(crop))  # faster there than on tensors
        crops.append(v2.functional.pil_to_tensor(crop))
    crops = [torch.stack(part) for part in (crops[:GLOBAL_CROPS], crops[GLOBAL_CROPS:]) if part]
    return {"crops": crops, "boxes": torch.tensor(boxes).float()}


def align(features: Tensor, crop: Tensor, region: Tensor, grid: int) -> Tensor:
    """Read grid x grid cells of a region of the image from the feature map of a crop.

    Args:
        features: maps (B, D, h, w) of the crops.
        crop, region: boxes (B, 4) in image pixels, the region inside the crop. The same region
            read from two crops gives features of the same places, cell by cell.
        grid: cells a side.

    Returns:
        (B, grid * grid, D), row by row.

    Source: RoI-align (He et al., Mask R-CNN, 2017), as in arXiv 2408.11054, section 3.
    """
    sides = crop[:, 2:] - crop[:, :2]
    boxes = ((region.view(-1, 2, 2) - crop[:, None, :2]) / sides[:, None]).flatten(1)
    boxes[:, 0::2] *= features.shape[3]  # now in patches of the crop
    boxes[:, 1::2] *= features.shape[2]
    index = torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes.dtype)
    cells = roi_align(features, torch.cat([index, boxes], dim=1), grid, aligned=True)
    return cells.flatten(2).mT  # (B, D, grid, grid) -> (B, N, D)


# ------------------------------------------------------------------------------------ training
# All randomness is a function of seed, step and sample: on a CPU neither workers nor interruptions
# change a bit of the result. With torchrun, every process works on a slice of each batch, `mine`.

PATCHES_PER_IMAGE = 10  # added by each step to each of the queues, one for a global crop
SIGNALS = signal.SIGINT, signal.SIGTERM
MAY_CHANGE = ("data", "out", "workers", "device", "log_every", "save_every")  # when resumed


def seed_of(*key: int | str) -> int:
    """A seed that is a function of the key, alike on every machine."""
    return zlib.crc32(repr(key).encode())


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; a single process leaves it as it is."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def find_images(folder: str) -> np.ndarray:
    """List the image files below a folder, sorted: an array of bytes, which workers do not copy."""
    places = os.walk(folder, followlinks=True)
    paths = (os.path.join(place, name) for place, _, names in places for name in names)
    found = (p for p in paths if p.lower().endswith(IMAGE_TYPES) and os.path.isfile(p))
    return np.array(sorted(map(os.fsencode, found)))


class Crops(Dataset):
    """Sample i of a training: the views of image i in the endless stream of shuffled epochs."""

    def __init__(self, files: np.ndarray, args: argparse.Namespace):
        self.files, self.args, self.epoch, self.skipped = files, args, None, set()

    def __getitem__(self, sample: int) -> dict:
        args, count = self.args, len(self.files)
        epoch, place = divmod(sample, count // args.batch_size * args.batch_size)
        if epoch != self.epoch:
            rng = np.random.default_rng(seed_of(args.seed, "epoch", epoch))
            self.epoch, self.order = epoch, rng.permutation(count)
        torch.manual_seed(seed_of(args.seed, "sample", sample))
        path = os.fsdecode(self.files[self.order[place]])
        for _ in range(100):
            try:
                image = read_image(path)
            except Exception as error:  # Pillow raises many kinds; another file takes its place
                if path not in self.skipped:
                    print(f"neco.py: skipped {path}, cannot be read: {error}", file=sys.stderr)
                self.skipped.add(path)
                path = os.fsdecode(self.files[int(torch.randint(count, ()))])
            else:
                return make_views(image, args.global_size, args.local_size, args.local_crops)
        raise InputError(f"--data {args.data}: 100 files in a row cannot be read, see above")

    @staticmethod
    def start_worker(_: int) -> None:
        for number in SIGNALS:  # the main process stops, and saves
            signal.signal(number, signal.SIG_IGN)


class Network(nn.Module):
    """Backbone and head, from crops to L2-normalised embeddings of their patches."""

    def __init__(self, backbone: nn.Module, hidden: int = 2048, out: int = 256):
        super().__init__()
        self.backbone = backbone
        sizes = backbone.embed_dim, hidden, hidden, out
        layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Embed views (b, K, 3, S, S), K crops of one size each: a list of maps (b, 256, h, w)."""
        maps = []
        for crops in views:
            features = self.backbone(crops.flatten(0, 1)).movedim(1, -1)  # (B * K, h, w, D)
            embeddings = F.normalize(self.head(features).float(), dim=-1).movedim(-1, 1)
            maps += embeddings.unflatten(0, crops.shape[:2]).unbind(1)
        return maps


class Run(nn.Module):
    """All that training changes: student, teacher, queues of teacher patches, and the optimiser."""

    def __init__(self, backbone: nn.Module, args: argparse.Namespace):
        super().__init__()
        # Both heads start alike. The public code draws two, which learned more slowly (README).
        self.student = Network(backbone, args.hidden)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.register_buffer("queue", torch.zeros(GLOBAL_CROPS, args.queue, 256))  # newest first
        self.to(args.device)
        groups = []
        for part, rate in ((self.student.backbone, args.lr), (self.student.head, args.head_lr)):
            for decays in (True, False):  # biases and other vectors do not decay
                chosen = [p for p in part.parameters() if (p.ndim > 1) == decays]
                groups.append({"params": chosen, "first_lr": rate, "decays": decays})
        self.optimizer = torch.optim.AdamW(groups, fused=True)


def align_pairs(student_maps, teacher_maps, boxes: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Read the same places from student and teacher, for every pair of crops.

    Takes lists of maps (B, D, h, w), one for each crop, the global ones first, and boxes
    (B, crops, 4). Returns the cells of both, (pairs, B, grid * grid, D). In a pair the teacher sees
    a global crop g, the student another crop v; pairs of the first global crop come first.
    """
    student, teacher = [], []
    for g in range(len(teacher_maps)):
        for v in (v for v in range(len(student_maps)) if v != g):
            a, b = boxes[:, g], boxes[:, v]
            region = torch.cat([a[:, :2].maximum(b[:, :2]), a[:, 2:].minimum(b[:, 2:])], dim=1)
            student.append(align(student_maps[v], b, region, grid))
            teacher.append(align(teacher_maps[g], a, region, grid))
    return torch.stack(student), torch.stack(teacher)


def train_step(run: Run, batch: dict, args, step: int, mine: slice, measure: bool) -> Tensor:
    """Take step number `step`, counted from 0, with the settings `args`, named as the flags.

    `batch` is what `make_views` returns, stacked for the b images at `mine` in the whole batch.
    Returns loss and, if `measure`, floor (entropy of the teacher's rankings): (2,), global means.
    """
    rng = torch.Generator().manual_seed(seed_of(args.seed, "step", step))  # alike in all processes
    torch.manual_seed(seed_of(args.seed, "drop path", step, mine.start))
    autocast = torch.autocast(args.device.type, torch.bfloat16, args.precision == "bf16")
    B, R, measures = args.batch_size, args.grid**2, torch.zeros(2, device=args.device)

    # Views: 2 global crops (b, 2, 3, S, S) of each image and some local ones, with their boxes.
    views = [crops.to(args.device, non_blocking=True) / 255 for crops in batch["crops"]]
    views = [v2.functional.normalize(crops, MEAN, STD) for crops in views]
    boxes = batch["boxes"].to(args.device, non_blocking=True)
    # Teacher: it reads the global crops.
    with torch.no_grad(), autocast:
        teacher_maps = run.teacher(views[:1])
    # Queue: random patches of the teacher enter it, the oldest ones leave. In a small batch each
    # image adds more of them, so that from the first step there are R to draw from.
    added = max(PATCHES_PER_IMAGE, math.ceil(R / B))
    patches = torch.stack(teacher_maps).flatten(3).mT  # (2, b, h * w, D)
    chosen = torch.randint(patches.shape[2], (GLOBAL_CROPS, B, added, 1), generator=rng)
    new = patches.new_zeros(GLOBAL_CROPS, B, added, patches.shape[3])
    new[:, mine] = patches.take_along_dim(chosen[:, mine].to(args.device), dim=2)
    all_reduce(new)  # a gather: every process fills in its own slice `mine`
    queue = torch.cat([new.flatten(1, 2), run.queue], dim=1)[:, : args.queue]
    # References: for each pair of crops the indices of the queue are shuffled and dealt out, R to
    # each image of the batch in turn, from the start again when all are dealt.
    filled, pairs = min((step + 1) * B * added, args.queue), GLOBAL_CROPS * (boxes.shape[1] - 1)
    dealt = torch.arange(B * R).view(B, R)[mine] % filled
    index = torch.stack([torch.randperm(filled, generator=rng)[dealt] for _ in range(pairs)])
    index = index.to(args.device, non_blocking=True).chunk(GLOBAL_CROPS)  # pairs of one global crop
    references = torch.cat([part[places] for part, places in zip(queue, index)])
    # Student: it reads all crops. Loss: it has to rank the references as the teacher does.
    run.optimizer.zero_grad()
    for rows in torch.arange(len(boxes), device=args.device).chunk(args.accumulate):
        with autocast:
            student_maps = run.student([view[rows] for view in views])
        target_maps, drawn = [maps[rows] for maps in teacher_maps], references[:, rows]
        cells, targets = align_pairs(student_maps, target_maps, boxes[rows], args.grid)
        loss = neco_loss(cells, targets, drawn, args.steepness, args.teacher_steepness)
        (loss * len(rows) / B).backward()
        measures[0] += loss.detach() * len(rows) / B
        if measure:
            floor = neco_loss(targets, targets, drawn, args.teacher_steepness)
            measures[1] += floor * len(rows) / B
    # Step: AdamW on the student; the rates and the weight decay follow a cosine.
    for parameter in run.student.parameters():
        if parameter.grad is not None:
            all_reduce(parameter.grad)
    cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))  # from 1 to 0
    start, end = args.weight_decay
    for group in run.optimizer.param_groups:
        group["lr"] = group["first_lr"] * cosine
        group["weight_decay"] = start * cosine + end * (1 - cosine) if group["decays"] else 0.0
    run.optimizer.step()
    # Average: the teacher follows the student, ever more slowly: the momentum ends at 1.
    with torch.no_grad():
        networks = list(run.teacher.parameters()), list(run.student.parameters())
        torch._foreach_lerp_(*networks, (1 - args.momentum) * cosine)
    run.queue = queue
    return all_reduce(measures)


def save(path: Path, content: dict | str) -> None:
    """Write tensors or text by way of a temporary name: the old or the new file is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary) if isinstance(content, dict) else temporary.write_text(content)
    os.replace(temporary, path)


def resume(path: Path, run: Run, settings: dict) -> tuple[int, list]:
    """Load a checkpoint; return its step and the rows of its log. InputError if it does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
    except Exception as error:  # torch.load raises errors of many kinds
        raise InputError(f"--out: {path} is broken: move it, or give another folder") from error
    for name, value in settings.items():
        if before.get(name) != value:
            advice = f"{before.get(name)}, not {value}: set it so, or take another folder"
            raise InputError(f"--out: the run in {path.parent} has {name} {advice}")
    run.load_state_dict(state["run"])
    run.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["log"]


def train(args: argparse.Namespace, backbone: nn.Module, files: np.ndarray) -> int:
    """Train from the start, or on from args.out/checkpoint.pth, and return the exit status.

    Ctrl-C and SIGTERM end it after the step under way, saved, with status 130 and 143.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total, share, out = args.batch_size, args.batch_size // ranks, Path(args.out)
    mine = slice(rank * share, (rank + 1) * share)
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    step, log, measures, begun, signals = 0, [], torch.zeros(2), None, [0]
    run = Run(backbone, args)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "checkpoint.pth").exists():
        step, log = resume(out / "checkpoint.pth", run, settings)
    first = step
    samples = (i * total + j for i in range(first, args.steps) for j in range(total)[mine])
    options = {"num_workers": args.workers, "pin_memory": args.device.type == "cuda"}
    options["worker_init_fn"] = Crops.start_worker
    batches = iter(DataLoader(Crops(files, args), batch_size=share, sampler=samples, **options))

    def save_all() -> None:
        if rank == 0 and step and math.isfinite(measures[0]):
            state = {"run": run.state_dict(), "optimizer": run.optimizer.state_dict()}
            save(out / "checkpoint.pth", state | {"step": step, "log": log, "settings": settings})
            save(out / "student.pth", run.student.backbone.model.state_dict())
            save(out / "teacher.pth", run.teacher.backbone.model.state_dict())
            rows = [",".join(f"{value:.6g}" for value in row) for row in log]
            save(out / "log.csv", "\n".join(["step,loss,floor,lr,weight_decay", *rows, ""]))

    for number in SIGNALS:  # the last one that arrived counts
        signal.signal(number, lambda arrived, _: signals.append(arrived))
    try:
        for batch in batches:
            begun = begun or time.monotonic()  # without the start of the workers
            logs = (step + 1) % args.log_every == 0 or step + 1 in (1, args.steps)
            measures = train_step(run, batch, args, step, mine, logs)
            step += 1
            stops = bool(all_reduce(torch.tensor(signals[-1])))
            saves = stops or step % args.save_every == 0
            if (logs or saves) and not math.isfinite(measures[0]):
                advice = f"what was saved stays in {out}: try a lower --lr and --head-lr"
                raise SystemExit(f"neco.py: the loss is not finite at step {step}; {advice}")
            if logs:
                group = run.optimizer.param_groups[0]
                log.append([step, *measures.tolist(), group["lr"], group["weight_decay"]])
            if rank == 0 and (logs or sys.stdout.isatty()):
                report(log[-1], step, args, (time.monotonic() - begun) / (step - first))
            if stops:
                break
            if saves:
                save_all()
    finally:  # at the end, and when something fails on the way
        save_all()
        if args.workers:
            batches._shutdown_workers()  # an exception that came from one would keep them all
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank == 0:
        start = "\n" * sys.stdout.isatty() + f"stopped at step {step}, " * (step < args.steps)
        print(f"{start}wrote student.pth, teacher.pth, checkpoint.pth and log.csv to {out}")
    return 128 + signals[-1] if step < args.steps else 0


def report(row: list[float], step: int, args: argparse.Namespace, pace: float) -> None:
    """Print how far a run is, with the last row of its log; `pace` is in seconds a step."""
    logged, loss, floor, *_ = row
    minutes = math.ceil((args.steps - step) * pace / 60)
    line = f"step {step}/{args.steps}  loss {loss:.3f} = floor {floor:.3f} + {loss - floor:.3f}  "
    line += f"{args.batch_size / pace:.1f} images/s  {minutes // 60}:{minutes % 60:02} h left"
    print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
    if logged == step and floor > 0.95 * math.log(args.grid**2):
        advice = "try a lower --lr, a --momentum nearer to 1, or a higher --teacher-steepness"
        print(f"neco.py: warning: the teacher's rankings are flat: {advice}", file=sys.stderr)


# -------------------------------------------------------------------------------- command line
# Every default is the paper's recipe. Likely mistakes end in a sentence and exit status 2.

FLAGS = {  # name: type or choices, default, help
    "data": (str, None, "folder of images, searched recursively; no labels needed"),
    "out": (str, "runs/neco", "folder for the results; a run in it is resumed"),
    "backbone": (str, "dinov2_vits14_reg", "dinov2_*, dinov3_*, dino_*, tiny, or any of --hub"),
    "hub": (str, None, "owner/repo[:ref] or local folder with hubconf.py; its code is run"),
    "weights": (str, None, "state dict to start from, a file or URL, instead of the hub's"),
    "epochs": (int, 25, "passes over the images"),
    "steps": (int, None, "number of steps, instead of epochs; the schedules span it"),
    "batch-size": (int, 64, "images a step, over all processes"),
    "accumulate": (int, 1, "parts of a batch, one after the other, to save memory"),
    "global-size": (int, None, "side of the 2 global crops (518, or less for whole patches)"),
    "local-size": (int, None, "side of the local crops (98, or less for whole patches)"),
    "local-crops": (int, 4, "local crops of an image"),
    "grid": (int, 7, "N x N cells of a crop pair rank N x N references"),
    "queue": (int, 8192, "teacher patches to draw from, at least N x N"),
    "hidden": (int, 2048, "width of the head; less for a small backbone"),
    "lr": (float, 1e-5, "learning rate of the backbone; three times as much can do harm"),
    "head-lr": (float, 1e-4, "learning rate of the head"),
    "weight-decay": (float, [0.04, 0.5], "of AdamW, at the start and at the end"),
    "momentum": (float, 0.9995, "of the teacher, 1 at the end; in a short run it hardly moves"),
    "steepness": (float, 100.0, "of the sorting network; the higher, the harder the sort"),
    "teacher-steepness": (float, None, "as --steepness; a higher one works against collapse"),
    "workers": (int, min(16, os.cpu_count() or 1), "processes that read images"),
    "device": (str, "cuda" if torch.cuda.is_available() else "cpu", "or cuda:1, mps, ..."),
    "precision": (("bf16", "fp32"), None, "of the networks; bf16 on a GPU, else fp32"),
    "seed": (int, 0, "of all that is random"),
    "log-every": (int, 50, "steps between lines of progress and rows of log.csv"),
    "save-every": (int, 1000, "steps between checkpoints"),
}


def run_command(parser, flags: list[str], argv: list[str] | None, command: Callable) -> int:
    """Add some FLAGS, call `command` with the arguments; a sentence, SystemExit(2) if it fails."""
    for name in flags:
        kind, default, text = FLAGS[name]
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        how |= {"nargs": 2} if isinstance(default, list) else {}
        text += "" if default is None else " (%(default)s)"
        parser.add_argument(f"--{name}", default=default, help=text, required=name == "data", **how)
    args = parser.parse_args(argv)
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {args.device} is not there: {str(error).splitlines()[0]}")
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    try:
        return command(args)
    except InputError as error:  # a worker of the loader puts its traceback before the sentence
        parser.error(" ".join(str(error).rpartition("InputError: ")[2].split()))
    except OSError as error:
        parser.error(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(args: argparse.Namespace) -> int:
    """Check what takes more than one flag to check, load the backbone, and train."""
    ranks, local_rank = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    parts = args.accumulate * max(ranks, 1)
    if args.batch_size % parts:
        advice = f"give a multiple of {parts}, which is --accumulate times the processes"
        raise InputError(f"--batch-size {args.batch_size} cannot be shared out: {advice}")
    if args.queue < args.grid**2:
        raise InputError(f"--queue {args.queue} is less than the {args.grid**2} cells of --grid")
    files = find_images(args.data)
    if len(files) < args.batch_size:
        advice = f"name another folder, or give a lower --batch-size than {args.batch_size}"
        raise InputError(f"--data {args.data} holds {len(files)} images: {advice}")
    if ranks:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        if local_rank:
            dist.barrier()  # the first process of a machine fills the cache of torch.hub
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, args.hub, args.weights)
    if ranks and not local_rank:
        dist.barrier()
    args.global_size = backbone.checked_size("--global-size", args.global_size, 518)
    args.local_size = backbone.checked_size("--local-size", args.local_size, 98)
    args.teacher_steepness = args.teacher_steepness or args.steepness
    args.images = len(files)
    args.steps = args.steps or args.epochs * (args.images // args.batch_size)
    return train(args, backbone, files)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status, or raise SystemExit(2) after bad input."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # started by torchrun
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parser = argparse.ArgumentParser("neco.py", usage="neco.py --data FOLDER [options]")
    return run_command(parser, list(FLAGS), argv, prepare)


if __name__ == "__main__":
    sys.exit(main())
