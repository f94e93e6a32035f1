# SPDX-License-Identifier: MIT
"""NeCo (Patch Neighbor Consistency, arXiv 2408.11054, ICLR 2025) in one file.

NeCo post-trains a pretrained vision transformer on unlabelled images, so that its patch features
serve dense tasks better. A student and a teacher, which is the student's slow average, see
different crops of one image. Take one patch from each crop, both of the same place, and compare the
two with the same reference patches, drawn at random from a queue of teacher patches. The student
learns to rank these references by similarity as the teacher does: which the neighbours of a patch
are, and in what order, should not depend on crop and colour. A differentiable sorting network
turns similarities into a ranking: each reference's probability of taking each rank.

The loss is the cross-entropy of the student's ranking, with the teacher's as its target. It cannot
fall below the entropy of the teacher's ranking, called its floor. Nothing in the loss keeps all
similarities from becoming equal: then rankings are nearly uniform, the floor is near log R for R
references, and the loss above it is 0. Small steps, a slow teacher and a steeper sort for the
teacher counteract this collapse. So a small loss above the floor is not a success in itself.

    python neco.py --data coco/train2017                              # the paper's recipe
    python neco.py --data photos --steps 2000 --batch-size 16         # a shorter run
    torchrun --nproc-per-node 4 neco.py --data coco/train2017         # on four GPUs

To copy the sort, take `soft_sort`, math and torch; for the loss also `neco_loss`, `RankingLoss`, F.
"""

import argparse
import copy
import io
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from torchvision.ops import box_area, roi_align
from torchvision.transforms import v2


class InputError(ValueError):
    """Something the user can put right, said in one sentence."""


# ------------------------------------------------------------------------------------ backbone
# Any vision transformer of torch.hub that returns its patch tokens after the final norm, as DINO,
# DINOv2 and DINOv3 do. Class and register tokens are left out: NeCo works on patches alone.


class TinyViT(nn.Module):
    """A small backbone for trials: DINOv2's patch size and interface, random weights."""

    patch_size, embed_dim = 14, 64

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2), nn.GELU(), nn.Conv2d(24, 64, 7, 7))
        options = {"activation": F.gelu, "norm_first": True, "batch_first": True}
        blocks = [nn.TransformerEncoderLayer(64, 2, 256, 0.0, **options) for _ in range(3)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(64))

    def get_intermediate_layers(self, images, n=1):
        tokens = self.stem(images).flatten(2).mT  # (B, h * w, D)
        return [self.blocks(tokens)]


class Backbone(nn.Module):
    """Patch features of a hub model: images (B, 3, H, W) -> (B, D, H / p, W / p)."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.embed_dim = model.embed_dim
        self.patch_size = int(getattr(model, "patch_size", None) or model.patch_embed.patch_size)
        self.tokens_of = model.get_intermediate_layers  # fails here if the model has none

    def forward(self, images):
        h, w = (side // self.patch_size for side in images.shape[2:])
        tokens = self.tokens_of(images, n=1)[0]
        patches = tokens[:, -h * w :]  # DINO has its class token in front
        return patches.mT.unflatten(2, (h, w))  # (B, h * w, D) -> (B, D, h, w)


def load_backbone(name="dinov2_vits14_reg", hub=None, weights=None):
    """Load a hub model as a module from images to a map of patch features.

    name: entry point of the hub, or `tiny` for the small random one of this file.
    hub: `owner/repo[:branch, tag or commit]` on GitHub, whose code is run, or a local folder with
        a hubconf.py; by default facebookresearch/ and the first word of the name.
    weights: file or URL of a state dict instead of the hub's: of this project, of the model's
        authors, or a published NeCo checkpoint. Heads are left out; all else must match.
    Returns a module in training mode, with drop path for DINO and DINOv2: to use its features, call
    its `eval()` first. It has `patch_size` p and `embed_dim` D, and turns ImageNet-normalised
    images (B, 3, H, W), H and W multiples of p, into features (B, D, H / p, W / p). InputError: the
    hub is out of reach or has no such vision transformer, or the weights do not fit.
    """
    kind = name.split("_")[0]
    options = {"pretrained": weights is None, "trust_repo": True}
    if kind in ("dino", "dinov2"):  # DINOv3 has none; in training, it rescales its positions
        options["drop_path_rate"] = 0.1
    try:
        if name == "tiny":
            model = TinyViT()
        else:
            hub = hub or f"facebookresearch/{kind}"
            options["source"] = "local" if os.path.isdir(hub) else "github"
            options["skip_validation"] = True  # validation knows branches and tags, not commits
            model = torch.hub.load(hub, name, **options)
        backbone = Backbone(model)
        if weights is not None:
            load_weights(model, weights)
    except Exception as error:  # the network, the code of the hub and torch.load can raise anything
        raise InputError(
            f"--backbone {name}, --hub {hub}, --weights {weights}: {str(error)[:300]}; give "
            "dinov2_*, dinov3_*, dino_*, tiny, or a vision transformer of another --hub"
        ) from error
    return backbone.train()


def load_weights(model, weights):
    """Load a state dict from a file or URL into a model, leaving out its training heads."""
    options = {"map_location": "cpu", "weights_only": True}
    if "://" in weights:
        name = f"{zlib.crc32(weights.encode())}.pth"  # in the cache; the ends of URLs may be alike
        state = torch.hub.load_state_dict_from_url(weights, file_name=name, **options)
    else:
        state = torch.load(weights, **options)
    state = state.get("state_dict", state)
    heads = ("projection_head.", "head.", "dino_head.", "ibot_head.")
    model.load_state_dict({key: state[key] for key in state if not key.startswith(heads)})


# ------------------------------------------------------------------------------------- sorting
# A wire holds a number. A comparator joins two wires and swaps their numbers, unless the smaller
# one is already on the wire with the smaller index. A sorting network is a fixed list of
# comparators, arranged in layers: those of a layer touch different wires and act at the same time.
# Relaxed, a comparator mixes its two numbers: barely if they are in order, and almost swaps them if
# not. To see who takes which rank, each wire also keeps a row: how much of each item its number
# contains, at first only its own. Rows are mixed as the numbers are; in the end they form the soft
# permutation.


def soft_sort(x, steepness=100.0):
    """Sort the last dimension with a differentiable sorting network, Batcher's bitonic one (1968).

    x: (..., n), n at least 1. Half precision is computed in float32.
    steepness: s > 0 of the comparators; the sort becomes exact as s times the gaps grows.
    Returns values (..., n), ascending in the limit of a large steepness, and the soft permutation
    (..., n, n) as [rank, item], smallest first: rows and columns sum to 1, and
    values = permutation @ x. Both can be differentiated any number of times.

    Source: Petersen et al., "Monotonic differentiable sorting networks", ICLR 2022, with the
    Cauchy distribution: a comparator of wires lo and hi mixes lo' = (1 - w) lo + w hi and
    hi' = (1 - w) hi + w lo, with w = 1/2 - atan(s (x_hi - x_lo)) / pi, near 0 if they are in order.
    """
    *lead, n = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = steepness * x.reshape(-1, n).T.contiguous()  # (n, B), a row for each wire
    # Unless n is a power of two, take the next one's network. Think of its first wires as holding
    # the smallest elements: these never move, so they and their comparators are left out.
    stages = (n - 1).bit_length()
    front = 2**stages - n
    wires = torch.arange(front, 2**stages, device=x.device)
    # Entries are stored only where they can differ from 0: that saves half the work. Before stage k
    # a wire contains only items of its own block of 2^k wires, so a column for each is enough.
    # Four wires with the items a, b, c and d have the columns
    #     start:    [a]  [b]  [c]  [d]
    #     stage 0:  [a b]  [a b]  [c d]  [c d]
    #     stage 1:  [a b c d] on every wire
    permutation = x[:, None] * 0 + 1  # (n, 1, B) ones; for n = 1 they still depend on x
    for stage in range(stages):
        # Two sorted blocks merge: columns for the items of the left block, then of the right one;
        # a wire has 0 for the other block's. Columns of wires that are left out are dropped.
        right = (wires >> stage & 1).view(-1, 1, 1)  # 1 on the wires of a right block, else 0
        columns = [permutation * (1 - right), permutation * right]
        permutation = torch.cat(columns, dim=1)[:, -n:]
        # The first layer compares each wire with its mirror image in the merged block, the later
        # ones with the wire a quarter of the block away, then an eighth, ..., then 1.
        for mask in [2 * 2**stage - 1, *(2**k for k in reversed(range(stage)))]:
            partner = wires ^ mask
            partner = torch.where(partner < front, wires, partner)  # itself: it stays as it is
            sign = (partner - wires).sign()[:, None]  # 1 on the first wire of two, -1 on the second
            other = x.index_select(0, partner - front)
            gap = sign * (other - x)  # x_hi - x_lo on both, times s, (n, B)
            # 1/2 - atan(gap) / pi, as the angle of the point (gap, 1): exact for w near 0, too.
            w = torch.atan2(x.new_ones(()), gap) / math.pi
            x = torch.lerp(x, other, w)
            other = permutation.index_select(0, partner - front)
            permutation = torch.lerp(permutation, other, w[:, None])
    return x.T.reshape(*lead, n) / steepness, permutation.permute(2, 0, 1).reshape(*lead, n, n)


# ---------------------------------------------------------------------------------------- loss
# Two patches of the same place, one of the student and one of the teacher, are compared with the
# same R references. The student's ranking P of these must become the teacher's, Q.


def neco_loss(student, teacher, references, steepness=100.0, teacher_steepness=None, floor=False):
    """Patch neighbor consistency: the student must rank the references as the teacher does.

    student: patch features (..., N, D), to be trained. Need not be normalised.
    teacher: features (..., N, D) of the same places in another view; gets no gradient.
    references: the R patches that all N are compared with, (..., R, D); get no gradient.
    steepness: s > 0 of the student's sorting network, and of the teacher's by default.
    teacher_steepness: above `steepness`, it sharpens the target.
    floor: return a pair, the loss and its floor.
    Returns -(Q * log P), summed over ranks, averaged over references and patches, with Q the
    teacher's soft permutation [rank, item] and P the student's: a scalar, float32, or float64 for
    float64 features; differentiable once, and not in torch.inference_mode. It is the entropy of Q,
    its floor, plus the divergence of P from Q, which is 0 if both have the same similarities and
    steepness; the same order with different gaps still costs a little. Raises ValueError if student
    and teacher differ in shape. Source: Pariza et al., arXiv 2408.11054, section 3.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)}, but teacher {tuple(teacher.shape)}")
    if teacher_steepness is None:
        teacher_steepness = steepness
    dtype = torch.promote_types(student.dtype, torch.float32)
    features = student, teacher.detach(), references.detach()
    with torch.autocast(student.device.type, enabled=False):
        student, teacher, references = (F.normalize(x.to(dtype), dim=-1) for x in features)
        x = (student @ references.mT).flatten(0, -2)  # cosine similarities (patches, R)
        y = (teacher @ references.mT).flatten(0, -2)
    loss_and_floor = RankingLoss.apply(x, y, steepness, teacher_steepness)
    return loss_and_floor if floor else loss_and_floor[0]


class RankingLoss(torch.autograd.Function):
    """Cross-entropy of the soft permutations of similarities x and y, (patches, R), and its floor.

    Autograd would keep dozens of R x R matrices for each patch. As the loss is a mean over patches,
    value and gradient can be computed together, some patches at a time, and their matrices freed.
    """

    @staticmethod
    def forward(ctx, x, y, steepness, teacher_steepness):
        # Enough patches to keep a GPU busy; on a CPU few enough for a core's cache.
        numbers = 2**25 if x.is_cuda else 2**19
        count = max(1, numbers // x.shape[1] ** 2)
        total = floor = 0
        gradients = []
        for some_x, some_y in zip(x.split(count), y.split(count)):
            _, Q = soft_sort(some_y, teacher_steepness)
            with torch.enable_grad():
                some_x = some_x.detach().requires_grad_()
                _, P = soft_sort(some_x, steepness)
                loss = -(Q * P.clamp_min(1e-37).log()).sum() / x.numel()
            gradients += torch.autograd.grad(loss, some_x)
            total += loss
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
# travel with them and tell which places two crops share. No crop is flipped, so a box says it all.

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
GLOBAL_CROPS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, hue=0.2)], p=0.8)
blur = v2.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item())))
change_colours = v2.Compose([jitter, v2.RandomGrayscale(0.2), v2.RandomApply([blur], p=0.5)])


def read_image(path):
    """Read an image file of any mode, the right way up, as RGB: uint8 (3, H, W).

    Pixels of more than 8 bits are rescaled: the least value becomes black, the largest white.
    """
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":
        pixels = np.asarray(image, dtype=float)
        span = pixels.min(), pixels.max()
        image = Image.fromarray(np.interp(pixels, span, (0, 255)).astype(np.uint8))
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def intersection(a, b):
    """What boxes (..., 4) of left, top, right, bottom share: a box, empty if they share nothing."""
    left_top = torch.maximum(a, b)[..., :2]
    right_bottom = torch.minimum(a, b)[..., 2:].maximum(left_top)
    return torch.cat([left_top, right_bottom], dim=-1)


def random_box(image, share, overlap, others):
    """Draw the box of a crop of an image (3, H, W), in pixels, that overlaps others (N, 4).

    Its aspect ratio is 3/4 to 4/3; share (least, most) and overlap (least) are of the image's area.
    Failing that, it is the largest in the middle of an elongated image, or the whole image.
    """
    height, width = image.shape[-2:]
    least = overlap * height * width
    for _ in range(100):
        top, left, h, w = v2.RandomResizedCrop.get_params(image, share, (3 / 4, 4 / 3))
        box = torch.tensor([left, top, left + w, top + h])
        shared = box_area(intersection(box, others))
        if (shared > least).all():
            return box
    return torch.tensor([0, 0, width, height])


def make_views(image, kinds):
    """Cut the crops of an image, uint8 (3, H, W), and change their colours.

    A kind of crops is a tuple: how many, their side in pixels, their (least, most) share of the
    image's area, least part of it in common with each global crop before. Global crops come first.
    Returns `crops`, for each kind a list of crops (3, side, side), uint8, and `boxes` (crops, 4):
    their left, top, right and bottom in image pixels. `torch.manual_seed` controls what is random.
    Source: multi-crop (Caron et al., SwAV, 2020) with the sizes of the public NeCo recipe.
    """
    boxes = torch.empty(0, 4)
    crops = []
    for count, side, share, overlap in kinds:
        crops.append([])
        for _ in range(count):
            box = random_box(image, share, overlap, boxes[:GLOBAL_CROPS])
            boxes = torch.cat([boxes, box[None]])
            left, top, right, bottom = box.tolist()
            crop = v2.functional.resize(image[:, top:bottom, left:right], [side, side])
            crop = change_colours(v2.functional.to_pil_image(crop))  # faster than on tensors
            crops[-1].append(v2.functional.pil_to_tensor(crop))
    return {"crops": crops, "boxes": boxes}


def align(features, crop, region, grid):
    """Read grid x grid cells of a region of the image from the feature maps of crops (B, D, h, w).

    `crop` and `region` are boxes (B, 4) in image pixels, the region inside the crop. Returns cells
    (B, grid * grid, D), row by row. Cell k of a region is the same place in all crops; but at the
    edge of a crop, where its map has no neighbour to interpolate with, a cell is read up to half a
    patch further inside. Source: RoI-align (He et al., Mask R-CNN, 2017), as in NeCo's section 3.
    """
    origin = crop[:, :2].repeat(1, 2)
    corner = crop[:, 2:].repeat(1, 2)
    h, w = features.shape[2:]
    boxes = (region - origin) / (corner - origin) * region.new_tensor([w, h, w, h])  # in patches
    cells = roi_align(features, list(boxes[:, None]), grid, aligned=True)
    return cells.flatten(2).mT  # (B, D, grid, grid) -> (B, N, D)


# ------------------------------------------------------------------------------------ training
# All that is random depends only on seed, step and image: on a CPU neither workers nor
# interruptions change a bit of the result. With torchrun, each process works on a slice of every
# batch, `mine`; gradients are summed and patches gathered, so all processes stay identical.

# Flags that may change when a run is resumed:
MAY_CHANGE = {"data", "out", "ranks", "workers", "device", "accumulate", "log_every", "save_every"}


def seed_of(*key):
    """A seed that is a function of the key, the same on every machine."""
    return zlib.crc32(repr(key).encode())


def all_reduce(values):
    """Sum a tensor over all processes, in place; with a single process do nothing."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def find_images(folder):
    """List the image files below a folder, sorted. Links to other folders are not followed."""
    found = []
    for place, _, names in os.walk(Path(folder)):
        found += [f"{place}/{name}" for name in names if name.lower().endswith(IMAGE_TYPES)]
    return sorted(found)


@dataclass
class Views:
    """Item `step`: what `make_views` returns, stacked for this process's slice of the batch."""

    files: list
    kinds: list
    args: argparse.Namespace
    mine: slice

    def __getitem__(self, step):
        batches = len(self.files) // self.args.batch_size  # in an epoch
        epoch, place = divmod(step, batches)
        shuffle = np.random.default_rng(seed_of(self.args.seed, "epoch", epoch))
        order = shuffle.permutation(len(self.files)).tolist()
        batch = order[place::batches][: self.args.batch_size]
        return default_collate([self.views(step, image) for image in batch[self.mine]])

    def views(self, step, image):
        torch.manual_seed(seed_of(self.args.seed, "views", step, image))
        for n in range(100):
            path = self.files[(image + n) % len(self.files)]
            try:
                return make_views(read_image(path), self.kinds)
            except Exception as error:  # Pillow raises all sorts; the next file takes its place
                print(f"neco.py: skipped {path}, cannot be read: {error}", file=sys.stderr)
        raise InputError(f"--data: 100 files in a row cannot be read, the last one {path}")


class Network(nn.Module):
    """Backbone and head, from crops to L2-normalised embeddings of their patches."""

    def __init__(self, backbone, hidden):
        super().__init__()
        self.backbone = backbone
        first = nn.Linear(backbone.embed_dim, hidden)
        middle = nn.Linear(hidden, hidden)
        last = nn.Linear(hidden, 256)
        for layer in (first, middle, last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)

    def forward(self, crops):
        """Embed crops of one size, (crops, b, 3, S, S): maps (crops, b, 256, h, w)."""
        features = self.backbone(crops.flatten(0, 1))  # (crops * b, D, h, w)
        embeddings = self.head(features.movedim(1, -1)).float()
        embeddings = F.normalize(embeddings, dim=-1).movedim(-1, 1)
        return embeddings.unflatten(0, crops.shape[:2])


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
        for name, parameter in self.student.named_parameters():
            rate = args.head_lr if name.startswith("head") else args.lr
            decays = parameter.ndim > 1  # not biases, nor the scales of norms and layers
            groups.append({"params": [parameter], "first_lr": rate, "decays": decays})
        self.optimizer = torch.optim.AdamW(groups, fused=True)


def push_patches(queue, maps, batch_size, mine):
    """Put up to 10 patches of each image in front of the queues (2, Q, D); return new queues.

    The maps (2, b, D, h, w) are the teacher's, of the global crops of the images at `mine` in the
    batch. The patches are chosen at random, in all maps at the same places.
    """
    patches = maps.flatten(3).mT  # (2, b, h * w, D)
    places = torch.randperm(patches.shape[2], device=patches.device)
    chosen = patches[:, :, places[:10]]
    new = chosen.new_zeros(GLOBAL_CROPS, batch_size, *chosen.shape[2:])
    new[:, mine] = chosen
    new = all_reduce(new).flatten(1, 2)  # others' images are 0 here: the sum gathers
    longer = torch.cat([new, queue], dim=1)
    return longer[:, : queue.shape[1]]


def draw_references(queue, pairs, batch_size, count):
    """Draw references from a queue (Q, D) for each image in each pair: (pairs, images, count, D).

    Those with the highest of Q random numbers are drawn: none twice for an image and pair.
    """
    numbers = torch.rand(pairs, batch_size, len(queue), device=queue.device)
    chosen = numbers.topk(min(count, len(queue))).indices
    return queue[chosen]


def align_pairs(student_maps, teacher_maps, boxes, grid):
    """Read the same places from student and teacher, for every pair of crops.

    Takes maps (B, D, h, w), one for each crop, the global ones first, and boxes (B, crops, 4).
    Returns the cells of both, (pairs, B, grid * grid, D). In a pair the teacher sees a global crop
    g, the student another crop v; pairs of the first global crop come first.
    """
    student, teacher = [], []
    for g, teacher_map in enumerate(teacher_maps):
        for v, student_map in enumerate(student_maps):
            if v != g:
                region = intersection(boxes[:, g], boxes[:, v])
                student.append(align(student_map, boxes[:, v], region, grid))
                teacher.append(align(teacher_map, boxes[:, g], region, grid))
    return torch.stack(student), torch.stack(teacher)


def train_step(run, batch, args, step, mine):
    """Take a step, counted from 0; return loss and floor over the whole batch, as one tensor.

    `batch` is the item of `Views`: the b images at `mine` in the whole batch. `args` are the flags.
    """
    torch.manual_seed(seed_of(args.seed, "step", step))  # all processes draw alike
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")
    B = args.batch_size
    R = args.grid**2
    # Views: global crops (2, b, 3, S, S), local ones (4, b, 3, s, s), and their boxes (b, 6, 4).
    views = []
    for crops in filter(len, batch["crops"]):  # there may be no local ones
        crops = torch.stack([crop.to(args.device) for crop in crops])
        views.append(v2.functional.normalize(crops / 255, MEAN, STD))
    boxes = batch["boxes"].to(args.device)
    # Teacher: it reads the global crops.
    with torch.no_grad(), autocast:
        teacher_maps = run.teacher(views[0])
    # Queue: some of the teacher's patches enter the queues, the oldest ones leave.
    run.queue = push_patches(run.queue, teacher_maps, B, mine)
    filled = run.queue[0].any(dim=1).sum()
    # References: R patches of a queue (this batch included), drawn anew for each image and pair of
    # crops. R = N, the cells of a pair, is the paper's choice; the loss does not need it.
    pairs = boxes.shape[1] - 1  # of one global crop with another crop
    drawn = [draw_references(queue[:filled], pairs, B, R) for queue in run.queue]
    references = torch.cat(drawn)[:, mine]  # (2 * pairs, b, R, 256), as in align_pairs
    run.optimizer.zero_grad()
    losses = torch.zeros(2, device=args.device)
    for n in range(args.accumulate):
        part = slice(n, None, args.accumulate)
        # Student: it reads all crops.
        student_maps = []
        with autocast:
            for crops in views:
                student_maps += run.student(crops[:, part])  # a map for each crop
        cells, targets = align_pairs(student_maps, teacher_maps[:, part], boxes[part], args.grid)
        # Loss: in each cell (2 * pairs, images, N) it must rank the references as the teacher does.
        steepnesses = args.steepness, args.teacher_steepness
        loss, floor = neco_loss(cells, targets, references[:, part], *steepnesses, floor=True)
        share = cells.shape[1] / B  # of these images in the whole batch
        (loss * share).backward()
        losses += torch.stack([loss.detach(), floor]) * share
    # Step: AdamW moves the student. A cosine takes the rates to 0, the weight decay to its end.
    for parameter in run.student.parameters():
        if parameter.grad is not None:
            all_reduce(parameter.grad)
    cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
    first, last = args.weight_decay
    for group in run.optimizer.param_groups:
        group["lr"] = group["first_lr"] * cosine
        group["weight_decay"] = (last + (first - last) * cosine) * group["decays"]
    run.optimizer.step()
    # Average: the teacher follows the student, ever more slowly: its momentum goes to 1.
    with torch.no_grad():
        for average, parameter in zip(run.teacher.parameters(), run.student.parameters()):
            average.lerp_(parameter, (1 - args.momentum) * cosine)
    return all_reduce(losses)


def save(content, path):
    """Write under a temporary name, then rename: never half a file; a full disk is an OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    Path(f"{path}.tmp").write_bytes(buffer.getbuffer())
    os.replace(f"{path}.tmp", path)


def save_run(run, step, log, args):
    """Write checkpoint, backbones and log, or exit if the weights are not finite."""
    if not nn.utils.parameters_to_vector(run.parameters()).norm().isfinite():
        sys.exit(f"neco.py: weights not finite after step {step}, not saved: try a lower --lr")
    state = {"step": step, "log": log, "settings": vars(args), "run": run.state_dict()}
    state["optimizer"] = run.optimizer.state_dict()
    save(state, f"{args.out}/checkpoint.pth")
    for name in ("student", "teacher"):
        weights = getattr(run, name).backbone.model.state_dict()
        save({key: value.cpu() for key, value in weights.items()}, f"{args.out}/{name}.pth")
    columns = "step,loss,floor,lr,weight_decay"
    np.savetxt(f"{args.out}/log.csv", log, "%.6g", ",", header=columns, comments="")


def start_run(args, rank):
    """Load or create a run: run, step, log. InputError if its settings differ from `args`."""
    if rank > 0:
        all_reduce(torch.zeros(1))  # wait for the first process, which fills torch.hub's cache
    torch.manual_seed(args.seed)
    run = Run(load_backbone(args.backbone, args.hub, args.weights), args)
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        # A new folder gets its settings at once, so that a run with other settings is refused.
        with open(f"{args.out}/checkpoint.pth", "ab") as file:
            if file.tell() == 0:
                torch.save({"step": 0, "log": [], "settings": vars(args)}, file)
        all_reduce(torch.zeros(1))  # lets the others go on
    state = torch.load(f"{args.out}/checkpoint.pth", map_location="cpu", weights_only=True)
    for name in vars(args).keys() - MAY_CHANGE:
        before = state["settings"].get(name)
        if before != vars(args)[name]:
            raise InputError(f"--out {args.out}: its run has {name} {before}: set that, or move it")
    if state["step"]:
        run.load_state_dict(state["run"])
        run.optimizer.load_state_dict(state["optimizer"])
    return run, state["step"], state["log"]


def train(args, files):
    """Train; return the exit status. Ctrl-C, or SIGTERM to this process, saves and ends a run."""
    rank = int(os.environ.get("RANK", 0))  # as torchrun sets it
    mine = slice(rank, None, args.ranks)
    run, first, log = start_run(args, rank)
    p = run.student.backbone.patch_size
    kinds = [
        (GLOBAL_CROPS, args.global_size // p * p, (0.25, 1.0), 0.02),
        (args.local_crops, args.local_size // p * p, (0.05, 0.25), 0.01),
    ]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers, which start now
    loader = DataLoader(
        Views(files, kinds, args, mine),
        batch_size=None,  # an item is a batch
        sampler=range(first, args.steps),
        num_workers=args.workers,
        pin_memory=args.device == "cuda",
    )
    batches = iter(loader)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda arrived, _: signals.append(arrived))
    if rank == 0:
        save_run(run, first, log, args)  # fails now, not later, if it cannot be written
    start = time.monotonic()
    for step in range(first, args.steps):
        losses = train_step(run, next(batches), args, step, mine)
        if rank > 0:
            continue  # only the first process reports, saves and stops; torchrun ends the others
        taken = step + 1
        if taken % args.log_every == 0 or taken in (1, args.steps):
            rates = run.optimizer.param_groups[0]
            loss, floor = losses.tolist()
            log.append([taken, loss, floor, rates["lr"], rates["weight_decay"]])
            hours = (time.monotonic() - start) / (taken - first) * (args.steps - taken) / 3600
            numbers = f"loss {loss:.3f} = floor {floor:.3f} + {loss - floor:.3f}"
            print(f"step {taken}/{args.steps}  {numbers}  {hours:.1f} h left", flush=True)
            if floor > 0.95 * math.log(args.grid**2):
                print("neco.py: warning: rankings are nearly flat: lower --lr", file=sys.stderr)
        if taken % args.save_every == 0 or taken == args.steps or signals:
            save_run(run, taken, log, args)
            if signals:
                break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signals:
        return 128 + signals[0]
    if rank == 0:
        print(f"{args.out} holds student.pth, teacher.pth and log.csv. To see what changed:")
        hub = f" --hub {args.hub}" if args.hub else ""
        flags = f"--data {args.data} --backbone {args.backbone}{hub} --weights"
        print(f"python eval_seg.py {flags} {args.weights or 'none'} {args.out}/student.pth")
    return 0


# -------------------------------------------------------------------------------- command line
# Every default is the paper's recipe. Likely mistakes end in one sentence and exit status 2.


# The type of a flag: an int or float (`kind`) from `least` to `most`.
def number(kind, least, most=math.inf):
    def number_in_range(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least} and at most {most}")
        return value

    return number_in_range


def flags(program):
    """A parser with the flags that neco.py and eval_seg.py share, and a function to add more."""
    parser = argparse.ArgumentParser(program, usage=f"{program} --data FOLDER [options]")

    def add(flag, kind, default, text, **more):
        text += "" if default is None else " (%(default)s)"
        parser.add_argument(flag, type=kind, default=default, help=text, **more)

    gpu = torch.cuda.is_available()
    devices = ["cuda", "cpu"] if gpu else ["cpu"]
    add("--backbone", str, "dinov2_vits14_reg", "dinov2_*, dinov3_*, dino_*, tiny, or any of --hub")
    add("--hub", str, None, "owner/repo[:ref] or local folder with hubconf.py; its code is run")
    add("--device", str, devices[0], "where to compute", choices=devices)
    precision = "bf16" if gpu else "fp32"
    add("--precision", str, precision, "fp32 for older GPUs than Ampere", choices=["bf16", "fp32"])
    add("--workers", number(int, 0), min(16, os.cpu_count()), "processes that read images")
    add("--seed", number(int, 0, 2**63), 0, "seed of all that is random")
    return parser, add


def run_command(command, parser, argv):
    """Call `command` with the arguments; errors that a user can fix end in a sentence."""
    args = parser.parse_args(argv)
    try:
        return command(args)
    except InputError as error:  # a worker of the loader puts its traceback before the sentence
        message = str(error).split("InputError: ")[-1]
    except torch.cuda.OutOfMemoryError:
        message = "the GPU is out of memory: lower the sizes or, in training, raise --accumulate"
    except OSError as error:
        message = f"cannot use {error.filename or args.out}: {error.strerror or error}"
    return parser.error(" ".join(message.split()))


def prepare(args):
    """Check what takes more than one flag to check, and train."""
    args.ranks = int(os.environ.get("WORLD_SIZE", 1))
    parts = args.accumulate * args.ranks
    if args.batch_size % parts:
        raise InputError(f"--batch-size {args.batch_size} is no multiple of {parts} (--accumulate)")
    os.listdir(args.data)  # an OSError if it is not there
    files = find_images(args.data)
    args.images = len(files)
    if args.images < args.batch_size:
        found = f"only {args.images} images ({' '.join(IMAGE_TYPES)})"
        raise InputError(f"--data {args.data} holds {found} for --batch-size {args.batch_size}")
    if args.steps is None:
        args.steps = args.epochs * (args.images // args.batch_size)
    if args.ranks > 1:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group()
    return train(args, files)


def main(argv=None):
    """Run the command line; return the exit status, or raise SystemExit(2) after bad input."""
    parser, add = flags("neco.py")
    natural = number(int, 1)
    side = number(int, 16)
    rate = number(float, 0)
    steepness = number(float, 1e-6)
    add("--data", str, None, "folder of images, searched recursively; no labels", required=True)
    add("--out", str, "runs/neco", "folder for the results; a run in it is resumed")
    add("--weights", str, None, "state dict to start from, a file or URL, instead of the hub's")
    add("--epochs", natural, 25, "passes over the images")
    add("--steps", natural, None, "number of steps, instead of epochs; the schedules span it")
    add("--batch-size", natural, 64, "images a step, over all processes")
    add("--accumulate", natural, 1, "parts of a batch, one after the other, to save memory")
    add("--global-size", side, 518, "side of the 2 global crops, rounded down to whole patches")
    add("--local-size", side, 98, "side of the local crops, rounded down to whole patches")
    add("--local-crops", number(int, 0), 4, "local crops of an image")
    add("--grid", natural, 7, "each pair of crops has N x N cells, compared with N x N references")
    add("--queue", natural, 8192, "teacher patches to draw from; 10 of each image are added")
    add("--hidden", natural, 2048, "width of the head; less for a small backbone")
    add("--lr", rate, 1e-5, "learning rate of the backbone; three times as much can do harm")
    add("--head-lr", rate, 1e-4, "learning rate of the head")
    add("--weight-decay", rate, [0.04, 0.5], "of AdamW, at the start and at the end", nargs=2)
    add("--momentum", number(float, 0, 1), 0.9995, "of the teacher; it goes to 1 at the end")
    add("--steepness", steepness, 100.0, "of the sorting network; the higher, the harder the sort")
    add("--teacher-steepness", steepness, None, "default --steepness; a higher one fights collapse")
    add("--log-every", natural, 50, "steps between lines of progress and rows of log.csv")
    add("--save-every", natural, 250, "steps between checkpoints")
    return run_command(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
