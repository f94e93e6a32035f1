# SPDX-License-Identifier: MIT
"""Tests of neco.py and eval_seg.py, without GPU and network: `python -m pytest test_neco.py`.

Methods are tested against slow and obvious versions of them; trainings and evaluations run on the
command line, on made-up images.
"""

import argparse
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision import transforms
from torchvision.transforms import functional as tvf

import eval_seg
import neco

torch.set_num_threads(1)  # the order of sums, hence the last bit, depends on it
exact = {"rtol": 1e-9, "atol": 1e-9}
near = {"rtol": 1e-6, "atol": 1e-6}


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def gradient(outputs, x):
    """Gradient of a fixed random sum of the outputs."""
    total = 0
    for y in outputs:
        total = total + (y * normal(*y.shape, seed=1, dtype=y.dtype)).sum()
    return torch.autograd.grad(total, x, retain_graph=True)[0]


# ----------------------------------------------------------------------------- sorting and loss


def comparators(n):
    """The bitonic network: compare mirror images, then merge, block by block.

    Of 2^k wires, those in front hold numbers that are smaller than all; they are left out.
    """
    stages = (n - 1).bit_length()
    front = 2**stages - n
    for stage in range(stages):
        masks = [2 ** (stage + 1) - 1] + [2**k for k in reversed(range(stage))]
        for mask in masks:
            for wire in range(front, 2**stages):
                if wire < wire ^ mask:
                    yield wire - front, (wire ^ mask) - front


def slow_sort(x, steepness):
    """The definition: each comparator swaps two numbers and two rows, more or less."""
    n = x.shape[-1]
    values = x
    permutation = torch.eye(n, dtype=x.dtype).expand(*x.shape, n)
    for lo, hi in comparators(n):
        w = 0.5 - torch.atan(steepness * (values[..., hi] - values[..., lo])) / math.pi
        swapped = list(range(n))
        swapped[lo], swapped[hi] = hi, lo
        values = torch.lerp(values, values[..., swapped], w[..., None])
        permutation = torch.lerp(permutation, permutation[..., swapped, :], w[..., None, None])
    return values, permutation


def test_a_steep_soft_sort_is_a_sort_for_every_n():
    for n in range(1, 257):
        x = normal(4, n, seed=n).argsort().double()
        expected = x.sort().values, F.one_hot(x.argsort(), n).double()
        assert_close(neco.soft_sort(x, 1e15), expected, **exact)


@pytest.mark.parametrize("n", [*range(1, 9), 22, 32, 43, 49, 64])
def test_soft_sort_equals_the_definition_and_diffsort_with_gradient(n):
    x = normal(2, n, seed=n).requires_grad_()
    ours = neco.soft_sort(x, 20.0)
    others = [slow_sort(x, 20.0)]
    if n in (2, 4, 8, 32, 49, 64):
        diffsort = pytest.importorskip("diffsort")
        values, permutation = diffsort.DiffSortNet("bitonic", n, steepness=20.0)(x)
        others.append((values, permutation.mT))  # which is [item, rank]
    for expected in others:
        assert_close(ours, expected, **exact)
        assert_close(gradient(ours, x), gradient(expected, x), **exact)
    if n < 6:
        assert torch.autograd.gradgradcheck(lambda x: neco.soft_sort(x, 3.0), x)


def features(batch=2, patches=3, references=6, dim=5, dtype=torch.float64):
    """Features of student, teacher, alike but for noise, and references; none normalised."""
    student = 3 * normal(batch, patches, dim, seed=1)
    teacher = student + normal(batch, patches, dim, seed=2)
    drawn = normal(batch, references, dim, seed=3)
    return [x.to(dtype) for x in (student, teacher, drawn)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = features(dtype=dtype)
    full = [x.float() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        results = *neco.soft_sort(inputs[0]), neco.neco_loss(*inputs)
    expected = *neco.soft_sort(full[0]), neco.neco_loss(*full)
    assert_close(results, expected, rtol=0, atol=0)


def slow_loss(student, teacher, references, steepness, teacher_steepness, sort=slow_sort):
    """The definition, for features (..., N, D) and references (..., R, D)."""
    references = references[..., None, :, :]
    x = F.cosine_similarity(student[..., None, :], references, dim=-1)
    y = F.cosine_similarity(teacher[..., None, :], references, dim=-1)
    _, P = sort(x, steepness)
    _, Q = sort(y, teacher_steepness)
    return -(Q * P.log()).sum(-2).mean()


@pytest.mark.parametrize("references", [2, 6, 7])
@pytest.mark.parametrize("steepness", [100.0, 7.0])
def test_loss_equals_the_definition_with_gradient(references, steepness):
    student, teacher, drawn = (x.requires_grad_() for x in features(references=references))
    for teacher_steepness in (None, 30.0):
        loss = neco.neco_loss(student, teacher, drawn, steepness, teacher_steepness)
        of_teacher = teacher_steepness or steepness
        expected = slow_loss(student, teacher, drawn, steepness, of_teacher)
        assert_close(loss, expected, **exact)
        assert_close(gradient([loss], student), gradient([expected], student), **exact)
    loss += 1  # in place, as one adds another term
    loss.backward()
    assert teacher.grad is None
    assert drawn.grad is None


def test_loss_of_many_patches_is_their_mean_in_both_precisions():
    # They are computed some at a time, and these 700 are more than that.
    inputs = features(batch=7, patches=100, references=49, dim=8)
    student = inputs[0].requires_grad_()
    expected = slow_loss(*inputs, 100.0, 100.0, sort=neco.soft_sort)
    right = gradient([expected], student)
    double = neco.neco_loss(*inputs)
    assert_close([double, gradient([double], student)], [expected, right], **exact)
    single = neco.neco_loss(*(x.float() for x in inputs))
    assert_close(single.double(), expected, rtol=1e-5, atol=0)
    error = gradient([single], student) - right
    assert error.norm() < 1e-3 * right.norm()  # P near 1e-7 has few digits


@pytest.mark.parametrize("steepness", [1e-6, 1e30])
def test_loss_is_finite_at_any_steepness(steepness):
    student, *others = features(batch=9, references=49, dtype=torch.float32)
    student.requires_grad_()
    loss = neco.neco_loss(student, *others, steepness)
    assert loss.isfinite()
    assert gradient([loss], student).isfinite().all()


def test_floor_is_the_entropy_of_the_teachers_ranking():
    student, teacher, references = features()
    entropy = slow_loss(teacher, teacher, references, 50.0, 50.0)
    loss, floor = neco.neco_loss(student, teacher, references, 10.0, 50.0, floor=True)
    assert_close(floor, entropy)
    assert loss > floor
    student = teacher.clone().requires_grad_()  # which reaches it
    loss = neco.neco_loss(student, teacher, references, 50.0)
    assert_close(loss, entropy)
    assert gradient([loss], student).abs().max() < 1e-10
    with pytest.raises(ValueError, match="teacher"):
        neco.neco_loss(student, teacher[:, :2], references)


# --------------------------------------------------------------------------------------- views

GLOBAL = (2, 16, (0.25, 1.0), 0.1)  # how many, their side, share of the image, overlap
LOCAL = (4, 8, (0.05, 0.25), 0.02)


def picture(width=96, height=72, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def overlap(a, b):
    """Area that boxes (..., 4) share."""
    sides = torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]
    return sides.clamp(min=0).prod(-1)


def draw_boxes(width, height, times):
    """Boxes (times, 6, 4) of 2 global and 4 local crops."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    views = [neco.make_views(image, [GLOBAL, LOCAL]) for _ in range(times)]
    return torch.stack([made["boxes"] for made in views])


def test_boxes_overlap_and_keep_their_share_of_the_image():
    torch.manual_seed(0)
    boxes = draw_boxes(640, 480, 300)
    w, h = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    assert (w / h).min() > 0.99 * 3 / 4  # they are rounded to whole pixels
    assert (w / h).max() < 1.01 * 4 / 3
    whole = 640 * 480
    shares = w * h / whole
    assert shares[:, :2].aminmax() == pytest.approx(GLOBAL[2], abs=0.03)
    assert shares[:, 2:].aminmax() == pytest.approx(LOCAL[2], abs=0.03)
    shared = overlap(boxes[:, :2, None], boxes[:, None]) / whole
    assert shared[:, 0, 1].min() > 0.1
    assert shared.min() > 0.02


def test_boxes_of_elongated_images_are_in_the_middle_or_all_of_it():
    boxes = draw_boxes(1000, 100, 9)[:, :2]
    assert (boxes == torch.tensor([433, 0, 566, 100])).all()  # 13 % of the image
    for width, height in ((1, 1), (1, 5000)):
        (boxes,) = draw_boxes(width, height, 1)
        assert (boxes[1:] == torch.tensor([0, 0, width, height])).all()


def test_views_show_their_boxes_and_follow_the_seed(monkeypatch):
    image = picture()

    def views(seed):
        torch.manual_seed(seed)
        made = neco.make_views(image, [GLOBAL, LOCAL, (1, 12, (0.1, 0.4), 0.01)])
        return sum(made["crops"], []), made["boxes"]

    coloured, again, other = views(5), views(5), views(6)
    assert_close(coloured, again, rtol=0, atol=0)
    assert not any(map(torch.equal, coloured[0], other[0]))
    monkeypatch.setattr(neco, "change_colours", lambda crop: crop)
    crops, boxes = views(5)
    assert not all(map(torch.equal, coloured[0], crops))
    for crop, box, side in zip(crops, boxes.tolist(), [16] * 2 + [8] * 4 + [12], strict=True):
        expected = tvf.to_pil_image(image).crop(box).resize((side, side), Image.BILINEAR)
        assert_close(crop, tvf.pil_to_tensor(expected), rtol=0, atol=2)


def places(box, n):
    """Centres (n * n, 2) of the cells of a box (4), row by row."""
    steps = (torch.arange(n).double() + 0.5) / n
    y_x = torch.cartesian_prod(steps, steps)
    return box[:2] + y_x.flip(1) * (box[2:] - box[:2])


def test_align_reads_the_same_places_from_all_crops():
    # Feature maps hold the places of their patches in the image.
    region = torch.tensor([50.0, 30.0, 70.0, 60.0]).double()
    for sides in ([0, 0, 80, 64], [40, 16, 120, 112]):
        crop = torch.tensor(sides).double()
        maps = places(crop, 8).T.view(1, 2, 8, 8)
        cells = neco.align(maps, crop[None], region[None], 7)[0]
        assert_close(cells, places(region, 7), **exact)
        # At its edges the map has no neighbour to interpolate with, within half a patch.
        cells = neco.align(maps, crop[None], crop[None], 7)[0]
        error = (cells - places(crop, 7)).abs()
        assert (error < (crop[2:] - crop[:2]) / 16).all()


def test_colours_change_as_torchvisions():
    jitter = transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    blur = transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5)
    public = transforms.Compose([jitter, transforms.RandomGrayscale(0.2), blur])
    image = tvf.to_pil_image(picture(6, 6) // 2 + 64).resize((48, 48))
    for seed in range(100):
        changed = []
        for change in (neco.change_colours, public):
            torch.manual_seed(seed)
            changed.append(tvf.pil_to_tensor(change(image)).float())
        ours, theirs = changed
        assert (ours - theirs)[:, 8:-8, 8:-8].abs().max() < 4  # Pillow blurs another way at edges


def test_images_of_all_modes_become_rgb(tmp_path):
    ramp = np.arange(0.0, 256.0, 4.0).reshape(8, 8)
    colour = np.dstack([ramp, ramp[::-1], ramp.T, ramp])
    grey = np.dstack([ramp] * 3) * (255 / 252)  # from the image's own minimum to its maximum
    turn = Image.Exif()
    turn[0x0112] = 6  # orientation: by a quarter, clockwise
    for name, pixels, expected in (
        ("rgba.png", colour.astype(np.uint8), colour[..., :3]),
        ("12 of 16 bits.png", (16 * ramp).astype(np.uint16), grey),
        ("32 bits.tif", (9999 * ramp - 7).astype(np.int32), grey),
        ("0 to 1.tif", (ramp / 255).astype(np.float32), grey),
    ):
        Image.fromarray(pixels).save(tmp_path / name, exif=turn)
        rgb = neco.read_image(tmp_path / name)
        assert rgb.dtype == torch.uint8
        turned = np.rot90(expected, -1)
        assert np.abs(rgb.permute(1, 2, 0).numpy() - turned).max() <= 1, name


def test_images_are_found_once_at_any_depth(tmp_path):
    (tmp_path / "b/c").mkdir(parents=True)
    names = ["b/ü é.JPG", "b/c/x.jpeg", "a.PNG", "z.webp", "B.bmp", "b/c/日本.tif", "b.Tiff"]
    for name in [*names, "notes.txt", "b/labels.json", "jpg", "c.jpg.part"]:
        (tmp_path / name).touch()
    (tmp_path / "b/up").symlink_to(tmp_path)  # which leads round in a circle
    for folder in (str(tmp_path), f"{tmp_path}/"):
        assert neco.find_images(folder) == sorted(str(tmp_path / name) for name in names)


# ------------------------------------------------------------------------------------- training

HUB = """
import torch
from torch import nn

class Patches(nn.Module):  # tokens are the mean colours of patches of 4 x 4 pixels, plus a bias
    embed_dim = 3
    def __init__(self, pretrained, drop_path_rate=0.0):
        super().__init__()
        self.bias, self.rate = nn.Parameter(torch.full((3,), 7.0 * pretrained)), drop_path_rate
    def tokens(self, images):
        return nn.functional.avg_pool2d(images, 4).flatten(2).mT + self.bias

class DinoV2(Patches):
    patch_size = 4
    def get_intermediate_layers(self, x, n=1, reshape=False): return (self.tokens(x),)

class DinoV3(Patches):
    patch_size = 4
    def get_intermediate_layers(self, x, *, n=1, reshape=False): return (self.tokens(x),)

class Dino(Patches):
    patch_embed = type("", (), {"patch_size": 4})
    def get_intermediate_layers(self, x, n=1):
        tokens = self.tokens(x)
        return [torch.cat([tokens[:, :1] + 1e3, tokens], dim=1)]  # a class token in front

class ConvNeXt(DinoV2): patch_size = None

def dinov2_small(*, pretrained=True, weights="", **kwargs): return DinoV2(pretrained, **kwargs)
def dinov3_small(*, pretrained=True, weights="", **kwargs):
    return DinoV3(pretrained, drop_path_rate=0.0, **kwargs)
def dino_small(pretrained=True, **kwargs): return Dino(pretrained, **kwargs)
def other(pretrained=True): return DinoV2(pretrained)
def large_patches(**options): return type("", (DinoV2,), {"patch_size": 16})(**options)
def classifier(pretrained=True): return nn.Sequential(nn.Flatten(), nn.LazyLinear(9))
def convnext(pretrained=True): return ConvNeXt(pretrained)
def raising(**options): raise RuntimeError("out\\nof order")
"""
RUN = """--backbone tiny --global-size 56 --local-size 28 --local-crops 2 --batch-size 4 --epochs 3
    --grid 3 --queue 64 --hidden 32 --log-every 1 --save-every 2 --workers 0 --device cpu"""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder of images, a hub, a finished run, and things that no run should take."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "images").mkdir()
    (folder / "unreadable").mkdir()
    for i in range(8):
        tvf.to_pil_image(picture(seed=i)).save(folder / "images" / f"{i}.png")
        (folder / "unreadable" / f"{i}.jpg").write_bytes(b"no image")
    (folder / "hubconf.py").write_text(HUB)
    assert neco.main(f"--data {folder}/images --out {folder}/run {RUN}".split()) == 0
    weights = load(folder / "run", "student")
    torch.save({}, folder / "other.pth")
    torch.save({**weights, "a pickle can name any function": os.getcwd}, folder / "code.pth")
    return folder


@pytest.mark.parametrize(
    "name, drop_path",
    [("dinov2_small", 0.1), ("dinov3_small", 0.0), ("dino_small", 0.1), ("other", 0.0)],
)
def test_hub_models_give_the_patches_in_their_places(place, name, drop_path):
    backbone = neco.load_backbone(name, str(place))
    image = picture(20, 12)[None].float()
    assert torch.equal(backbone(image), F.avg_pool2d(image, 4) + 7)  # 7: the hub's own weights
    assert (backbone.patch_size, backbone.embed_dim, backbone.training) == (4, 3, True)
    assert backbone.model.rate == drop_path


def test_weights_are_those_of_the_whole_url(place, tmp_path, monkeypatch):
    # Files of one name in two folders, as authors publish them.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    heads = ("head.0.bias", "projection_head.0.bias", "dino_head.0.bias", "ibot_head.0.bias")
    for name in "ab":
        state = {"bias": torch.rand(3), **dict.fromkeys(heads, torch.ones(2))}
        (tmp_path / name).mkdir()
        torch.save({"state_dict": state}, tmp_path / name / "student.ckpt")
        url = f"file://{tmp_path}/{name}/student.ckpt"
        backbone = neco.load_backbone("other", str(place), url)
        assert torch.equal(backbone.model.bias, state["bias"])


def test_a_hub_can_be_pinned_to_a_commit(tmp_path, monkeypatch):
    def download(url, dst, hash_prefix=None, progress=True):
        assert url == f"https://github.com/owner/repo/zipball/{'0' * 40}"
        with zipfile.ZipFile(dst, "w") as archive:
            archive.writestr("repo-0/", "")
            archive.writestr("repo-0/hubconf.py", HUB)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: 1 / 0)  # it would ask for the branches
    backbone = neco.load_backbone("dinov2_small", f"owner/repo:{'0' * 40}")
    assert backbone.model.rate == 0.1


@pytest.fixture
def command(capfd, place):
    """Run the command line in this process: flags, later ones count -> exit status and stderr."""

    def call(out, flags="", data=place / "images"):
        try:
            status = neco.main(f"--data {data} --out {out} {RUN} {flags}".split())
        except SystemExit as stop:
            status = stop.code  # or a message, which Python prints
        return status, capfd.readouterr().err

    return call


def load(folder, name):
    """A file of a run; "log" has rows of step, loss, floor, learning rate, weight decay."""
    if name == "log":
        return np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1, ndmin=2)
    state = torch.load(folder / f"{name}.pth", weights_only=True)
    state.pop("settings", None)
    return state


def assert_same_run(a, b):
    """Bit for bit, but for the settings."""
    for name in ("student", "teacher", "checkpoint"):
        ours, theirs = tree_leaves(load(a, name)), tree_leaves(load(b, name))
        for x, y in zip(ours, theirs, strict=True):
            assert np.array_equal(x, y), name


def spy(name, patch, module=neco, action=lambda calls: None):
    """Collect the arguments of the calls of a function, by name, and act before each call."""
    function, calls = getattr(module, name), []

    def wrapper(*arguments, **options):
        calls.append(inspect.signature(function).bind(*arguments, **options).arguments)
        action(calls)
        return function(*arguments, **options)

    patch(module, name, wrapper)
    return calls


def test_the_log_has_the_rates_of_every_step(place):
    step, _, _, rate, decay = load(place / "run", "log").T
    assert step.tolist() == [1, 2, 3, 4, 5, 6]
    left = (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    assert rate == pytest.approx(1e-5 * left, rel=1e-5)
    assert decay == pytest.approx(0.5 - 0.46 * left, rel=1e-5)


def test_flat_rankings_are_warned_of(command, tmp_path):
    for flags, warnings in (("", 0), ("--steepness 1e-3", 1)):
        status, err = command(tmp_path / str(warnings), f"--steps 1 {flags}")
        assert status == 0 and err.count("rankings are nearly flat") == warnings


def public_loss(student_maps, teacher_maps, boxes, grid, references):
    """Loss of a step as the public code has it, and its floor; all pairs have the same weight."""
    losses = []
    pairs = [(g, v) for g in range(2) for v in range(4) if v != g]
    for (g, v), drawn in zip(pairs, references, strict=True):
        shared = neco.intersection(boxes[:, g], boxes[:, v])
        cells = neco.align(student_maps[v], boxes[:, v], shared, grid)
        targets = neco.align(teacher_maps[g], boxes[:, g], shared, grid)
        loss = slow_loss(cells, targets, drawn, 30.0, 60.0)
        floor = slow_loss(targets, targets, drawn, 60.0, 60.0)
        losses.append([loss.item(), floor.item()])
    return np.mean(losses, axis=0)


def test_a_step_has_the_crops_and_the_loss_of_the_public_code(command, tmp_path, monkeypatch):
    names = "Views", "train_step", "align_pairs", "neco_loss"
    views, steps, aligned, compared = (spy(name, monkeypatch.setattr) for name in names)
    convolved = spy("forward", monkeypatch.setattr, torch.nn.Conv2d)
    flags = "--global-size 60 --steepness 30 --teacher-steepness 60 --accumulate 2 --steps 1"
    assert command(tmp_path, flags)[0] == 0
    # In whole patches, which have 14 pixels.
    assert views[0]["kinds"] == [(2, 56, (0.25, 1.0), 0.02), (2, 28, (0.05, 0.25), 0.01)]
    crops = torch.cat(steps[0]["batch"]["crops"][0]) / 255
    crops = tvf.normalize(crops, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert_close(convolved[0]["input"], crops)
    monkeypatch.undo()
    losses = []
    for maps, call in zip(aligned, compared, strict=True):
        single = {**maps, "references": call["references"]}
        double = tree_map_only(torch.Tensor, lambda x: x.detach().double(), single)
        losses.append(public_loss(**double))
        references = double.pop("references")
        cells, targets = neco.align_pairs(**double)
        found = neco.neco_loss(cells, targets, references, 30.0, 60.0, floor=True)
        assert [x.item() for x in found] == pytest.approx(losses[-1], rel=1e-9)
        for drawn, queue in zip(call["references"].chunk(2), steps[0]["run"].queue):
            same = (drawn[..., None, :] == queue[:40]).all(-1)  # 10 patches of each of 4 images
            assert same.any(-1).all()
    assert load(tmp_path, "log")[0, 1:3] == pytest.approx(np.mean(losses, axis=0), rel=1e-5)


def test_queues_hold_the_newest_patches_of_the_same_places():
    # Two global crops of 4 images, with 16 patches each that are numbered from 0 to 127.
    maps = torch.arange(128.0).view(2, 4, 1, 4, 4)
    first = neco.push_patches(torch.zeros(2, 64, 1), maps, 4, slice(None))
    second = neco.push_patches(first, maps + 128, 4, slice(None))
    new, old = second.split([40, 24], dim=1)
    assert torch.equal(old, first[:, :24])
    assert len(new.unique()) == 80
    assert len((new % 16).unique()) == 10
    assert torch.equal(new[0] + 64, new[1])


def test_references_are_drawn_without_repetition():
    queue = torch.arange(40.0)[:, None]
    drawn = neco.draw_references(queue, 5, 4, 9)
    ordered = drawn.view(20, 9).sort().values
    assert (ordered.diff() > 0).all()
    assert len(ordered.unique(dim=0)) == 20  # others for each image in each pair
    assert neco.draw_references(queue[:3], 5, 4, 9).shape == (5, 4, 3, 1)


def test_an_epoch_reads_every_image_once_in_an_order_of_its_own(place, monkeypatch):
    reads = spy("read_image", monkeypatch.setattr)
    files = neco.find_images(place / "images")
    args = argparse.Namespace(seed=0, batch_size=4)
    views = neco.Views(files, [GLOBAL], args, slice(None))
    for step in range(4):
        assert len(views[step]["boxes"]) == 4
    paths = [call["path"] for call in reads]
    first, second = paths[:8], paths[8:]
    assert sorted(first) == sorted(second) == files
    assert first != second


def test_rates_decay_and_momentum_move_what_they_should(command, tmp_path, monkeypatch):
    states = []  # before each step

    def keep(calls):
        states.append(load(tmp_path, "checkpoint")["run"])

    spy("neco_loss", monkeypatch.setattr, action=keep)
    flags = "--lr 1e-2 --head-lr 1e-3 --momentum 0.75 --save-every 1"
    assert command(tmp_path, f"{flags} --weight-decay 0 0 --steps 2")[0] == 0
    start, first = states
    second = load(tmp_path, "checkpoint")["run"]
    shutil.rmtree(tmp_path)
    assert command(tmp_path, f"{flags} --weight-decay 5 9 --steps 1")[0] == 0
    decayed = load(tmp_path, "checkpoint")["run"]
    for key in filter(re.compile("student").match, start):
        value, student = start[key], first[key]
        rate = 1e-3 if "head" in key else 1e-2
        move = (student - value).abs().median()
        assert move == pytest.approx(rate, rel=0.02)  # Adam's first step
        decay = 5 * rate * (value.ndim > 1)  # biases do not
        assert_close(decayed[key], student - decay * value, **near)
        average = key.replace("student", "teacher")
        assert torch.equal(start[average], value)
        assert_close(first[average], value.lerp(student, 0.25), **near)
        follows = first[average].lerp(second[key], 0.125)
        assert_close(second[average], follows, **near)


def test_training_learns_and_leaves_out_files_that_cannot_be_read(command, tmp_path, place):
    data = shutil.copytree(place / "images", tmp_path / "data")
    (data / "cut.png").write_bytes((data / "0.png").read_bytes()[:3000])
    above_floor = []
    for rate in (3e-4, 0):
        flags = f"""--steps 30 --batch-size 8 --hidden 64 --momentum 1 --local-crops 0 --grid 4
            --queue 400 --steepness 50 --workers 1 --lr {rate} --head-lr {rate}"""
        status, err = command(tmp_path / str(rate), flags, data)
        assert status == 0
        (line,) = set(err.splitlines())
        assert f"skipped {data}/cut.png, cannot be read" in line
        _, loss, floor, *_ = load(tmp_path / str(rate), "log").T
        above_floor.append((loss - floor)[-10:].mean())
    assert above_floor[0] < 0.8 * above_floor[1]


def run_process(log, argv, rank=None, where="os.replace", call=99, number=SIGKILL):
    """Run neco.py in a session of its own until a signal strikes it before a call of `where`.

    With a rank, it is one of two processes, as torchrun starts them.
    """
    multiprocessing.set_start_method("fork", force=True)  # of the workers; here it is the server's
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if rank is not None:
        port = str(20000 + os.getppid() % 10000)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=rank)

    def strike(calls):
        time.sleep(0.2)  # so that the main process waits for a worker
        if len(calls) == call:
            os.killpg(0, number)

    module, _, name = where.rpartition(".")
    spy(name, setattr, pkgutil.resolve_name(module), strike)
    sys.exit(neco.main(argv.split()))


def start_processes(log, *runs):
    """Call `run_process` with each of these arguments; return exit statuses, -N for signal N.

    The processes are forked from a server that has imported neco, as that takes some seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neco", "pytest"])
    processes = [context.Process(target=run_process, args=(log, *run)) for run in runs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


INTERRUPTIONS = [  # before which call of what, by which signal; exit status; workers
    ("neco.neco_loss", 4, SIGKILL, -9, 0),  # in step 4, of which 2 are saved
    ("os.replace", 1, SIGKILL, -9, 1),  # the folder is claimed, and nothing written
    ("os.replace", 11, SIGKILL, -9, 0),  # checkpoint of the last step, student of step 4
    ("neco.neco_loss", 3, SIGTERM, 143, 2),
    ("neco.make_views", 12, SIGINT, 130, 1),  # while the worker reads for step 3
]


@pytest.mark.parametrize("where, call, number, status, workers", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_a_whole_one(
    command, tmp_path, place, where, call, number, status, workers
):
    log, out = tmp_path / "log", tmp_path / "out"
    argv = f"--data {place}/images --out {out} {RUN} --workers {workers}"
    statuses = start_processes(log, [argv, None, where, call, number])
    assert statuses == [status], log.read_text()
    assert "Traceback" not in log.read_text()
    for line in re.findall(b"step .*", log.read_bytes()):
        assert len(line) < 80  # nothing is written over
    if number == SIGTERM:
        assert len(load(out, "log")) == 3  # the step under way is saved
    assert command(out, "--workers 1")[0] == 0
    assert_same_run(out, place / "run")


def test_one_of_two_runs_that_start_together_gets_the_folder(tmp_path, place):
    argv = f"--data {place}/images --out {tmp_path}/out {RUN} --steps 2"
    statuses = start_processes(tmp_path / "log", [f"{argv} --lr 1e-5"], [f"{argv} --lr 2e-5"])
    text = (tmp_path / "log").read_text()
    assert sorted(statuses) == [0, 2], text
    assert "its run has lr" in text


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(
    command, tmp_path, monkeypatch
):
    steps = spy("train_step", monkeypatch.setattr)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as a disk that is full
    try:
        status, err = command(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert f"cannot use {tmp_path}: File too large" in err
    assert steps == []


def weights_of(folder, network="student"):
    """All weights of a network but some biases: those of keys have no gradient but rounding."""
    state = load(folder, network)
    return torch.cat([state[key].flatten() for key in state if "in_proj_bias" not in key])


def test_processes_and_accumulation_train_as_one(command, tmp_path, place):
    flags = f"--weights {place}/run/student.pth --steps 4 --lr 1e-3 --momentum 0.5 --seed 1"
    assert command(tmp_path / "one", flags)[0] == 0
    assert command(tmp_path / "parts", f"{flags} --accumulate 4")[0] == 0
    # The second process is killed between the optimiser's step and the end of step 3. What is
    # saved is step 2, and the run goes on from there.
    log = tmp_path / "log"
    argv = f"--data {place}/images --out {tmp_path}/two {RUN} {flags} --accumulate 2"
    struck = [argv, "1", "torch.optim.AdamW.step", 3]
    failed, killed = start_processes(log, [argv, "0"], struck)
    assert failed != 0
    assert killed == -9
    assert load(tmp_path / "two", "checkpoint")["step"] == 2
    assert start_processes(log, [argv, "0"], [argv, "1"]) == [0, 0], log.read_text()
    assert log.read_text().count("step 4/4") == 1
    for other, network in itertools.product(("parts", "two"), ("student", "teacher")):
        logs = [load(tmp_path / run, "log") for run in (other, "one")]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)
        whole = weights_of(tmp_path / "one", network)
        move = whole - weights_of(place / "run")
        error = weights_of(tmp_path / other, network) - whole
        assert error.norm() < 1e-3 * move.norm()


@pytest.mark.parametrize("flags", ["--steps 1", "--save-every 1"])
def test_weights_that_are_not_finite_are_never_saved(command, tmp_path, flags):
    # One step of this size is finite, but the weights that it leaves are worth nothing.
    message, _ = command(tmp_path, f"{flags} --lr 1e38 --head-lr 1e38")
    assert "not finite after step 1" in message
    assert load(tmp_path, "checkpoint")["step"] == 0
    assert all(x.isfinite().all() for x in load(tmp_path, "student").values())


def test_a_run_too_large_for_a_gpu_may_accumulate_more(command, tmp_path, monkeypatch):
    def fill(calls):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        spy("neco_loss", patch.setattr, action=fill)
        status, err = command(tmp_path)
    assert status == 2
    assert "--accumulate" in err.splitlines()[-1]
    assert command(tmp_path, "--accumulate 2")[0] == 0


# ------------------------------------------------------------------- command line and bad input

RECIPE = """--data here --out runs/neco --backbone dinov2_vits14_reg --epochs 25 --batch-size 64
--accumulate 1 --global-size 518 --local-size 98 --local-crops 4 --grid 7 --queue 8192
--hidden 2048 --lr 1e-5 --head-lr 1e-4 --weight-decay 0.04 0.5 --momentum 0.9995 --steepness 100
--seed 0 --log-every 50 --save-every 250"""


def test_defaults_are_the_recipes(monkeypatch, capsys):
    monkeypatch.setattr(neco, "prepare", vars)
    found = neco.main(["--data", "here"])
    assert found == neco.main(RECIPE.split())
    assert list(found.values()).count(None) == 4  # hub, weights, steps, teacher_steepness
    with pytest.raises(SystemExit, match="0"):
        neco.main(["--help"])
    assert "no labels" in capsys.readouterr().out


# Refused, and in the last line of stderr stands what follows "says", else the flags themselves.
REFUSED = """--data HERE/nowhere says HERE/nowhere directory; --data HERE/other.pth says HERE/other;
--data HERE/run says --data HERE/run .jpg;
--data HERE/unreadable says --data cannot HERE/unreadable/;
--data HERE/unreadable --workers 2 says --data cannot HERE/unreadable/;
--batch-size 9 says --data 8 9; --batch-size 4 --accumulate 3 says --batch-size 4 3;
--weight-decay 0.04 says --weight-decay 2; --weight-decay -1 1 says --weight-decay;
--steps 2.5; --steps -3; --steps 0; --epochs 0; --batch-size 0; --accumulate -1; --grid 0;
--local-crops -1; --workers -1; --hidden 0; --log-every 0; --save-every 0; --global-size 0;
--steepness 0; --teacher-steepness nan; --lr -1; --lr nan; --head-lr x; --momentum 2;
--seed 99999999999999999999; --precision fp8 says --precision fp8 bf16 fp32; --device mps;
--backbone dinov5 says --backbone dinov5 dinov2_ dinov3_ dino_ tiny;
--backbone dinov2_vits14 says --hub facebookresearch/dinov2 --weights;
--backbone x --hub HERE/run says --hub HERE/run hubconf.py; --backbone absent --hub HERE;
--backbone convnext --hub HERE; --backbone classifier --hub HERE says classifier HERE vision;
--backbone raising --hub HERE says --hub HERE raising out of order;
--weights HERE/nowhere.pth; --weights file://HERE/nowhere.pth; --weights HERE/code.pth;
--weights HERE/other.pth says --weights HERE/other.pth stem; --out HERE/other.pth says HERE/other;
--out HERE/run --lr 2e-5 says --out HERE/run lr 1e-05"""


@pytest.mark.parametrize("case", REFUSED.replace("\n", " ").split("; "))
def test_bad_input_is_named_and_nothing_written_over(command, place, tmp_path, monkeypatch, case):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoint = place / "run/checkpoint.pth"
    before = checkpoint.read_bytes()
    flags, _, words = case.replace("HERE", str(place)).partition(" says ")
    status, err = command(tmp_path / "out", flags)
    assert status == 2
    assert "Traceback" not in err
    (last,) = re.findall("neco.py: error: .*", err)
    for word in (words or flags).split():
        assert word in last
    assert checkpoint.read_bytes() == before


def test_the_readmes_example_runs():
    readme = Path(__file__).with_name("README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(block, names := {})
    assert names["loss"].isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(command, tmp_path):
    inputs = features(30, 30, 49, 16, dtype=torch.float32)
    student = inputs[0].requires_grad_()
    loss = neco.neco_loss(*inputs)
    on_gpu = neco.neco_loss(*(x.cuda() for x in inputs))
    right = [loss, gradient([loss], student)]
    assert_close([on_gpu.cpu(), gradient([on_gpu], student)], right, rtol=1e-3, atol=1e-5)
    assert command(tmp_path, "--device cuda --precision bf16 --steps 3")[0] == 0
    assert all(x.device.type == "cpu" for x in load(tmp_path, "student").values())


# ------------------------------------------------------------------------------------ eval_seg.py


class MeanColour(torch.nn.Module):
    """A backbone whose patch feature is its mean colour, so that the answers are known."""

    patch_size, embed_dim = 4, 3

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)  # which evaluation mode switches off
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.drop(F.avg_pool2d(images, self.patch_size))


def write_image(path, pixels):
    """Write an image, or bytes that are none; with values of one channel as a palette image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, bytes):
        return path.write_bytes(pixels)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if image.mode == "L":
        image.putpalette(list(range(256)) * 3)
    return image.save(path)


def stripes(*values):
    """A mask (8, 8) whose columns cycle through the values."""
    return np.resize(np.array(values, np.uint8), (8, 8))


GREY = np.full((8, 8, 3), 90)


def write_voc(root):
    for name in "abc":
        write_image(root / f"JPEGImages/{name}.jpg", GREY)
        write_image(root / f"SegmentationClass/{name}.png", stripes(0, 20, 255, 7))
        write_image(root / f"SegmentationClassAug/{name}.png", stripes(0, 15))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a")
    (lists / "trainaug.txt").write_text("a\n/JPEGImages/b.jpg /SegmentationClassAug/b.png\n")
    (lists / "val.txt").write_text("c")


def write_ade20k(root):
    for name in ("training/a", "training/b", "validation/c"):
        write_image(root / f"images/{name}.jpg", GREY)
        write_image(root / f"annotations/{name}.png", stripes(0, 1, 150, 2))
    rows = [f"{n}\t0.1\t{n}\t7\tthing {n}, alias\n" for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))


def write_coco(root):
    """Both kinds of annotations; one panoptic id needs more than 16 bits."""
    folder = root / "annotations"
    names = {1: "person", 2: "vehicle", 17: "animal", 92: "textile", 149: "ground", 183: "other"}
    categories = [{"id": i, "supercategory": n, "isthing": i < 92} for i, n in names.items()]
    segments = {70000: 1, 300: 2, 5: 17, 6: 149}
    info = [{"id": i, "category_id": category} for i, category in segments.items()]
    colours = [[i % 256, i // 256 % 256, i // 65536] for i in [*segments, 0]]
    pixels = np.resize(colours, (8, 8, 3))
    for split, count in ("train2017", 20), ("val2017", 1):
        annotations = []
        for file in (f"{split}{n}" for n in range(count)):
            write_image(root / split / f"{file}.jpg", GREY)
            write_image(folder / f"panoptic_{split}/{file}.png", pixels)
            write_image(folder / f"stuff_{split}_pixelmaps/{file}.png", stripes(0, 92, 149, 183))
            annotations.append({"file_name": f"{file}.png", "segments_info": info})
        content = {"categories": categories, "annotations": annotations}
        (folder / f"panoptic_{split}.json").write_text(json.dumps(content))
    (folder / "stuff_val2017.json").write_text(json.dumps({"categories": categories[3:]}))


def write_folder(root):
    """Two colours, classes 0 and 3, left and right of a border that differs between images."""
    rng = np.random.default_rng(0)
    for split, n in itertools.product(("train", "val"), range(4)):
        border = rng.integers(14, 42)
        mask = np.zeros((56, 56))
        mask[:, border:] = 3
        mask[:2] = 255
        image = rng.integers(-30, 30, (56, 56, 3))
        image[:, :border] += [40, 40, 220]
        image[:, border:] += [220, 40, 40]
        write_image(root / split / f"images/{n}.png", image)
        write_image(root / split / f"masks/{n}.png", mask)


# How to write it, its number of classes, items to learn from and to predict, the classes in the
# first row of the last mask, and those that occur in the masks to predict.
VOC = ["background", "car", "tvmonitor"]
ADE20K = ["thing 1", "thing 2", "thing 150"]
THINGS = ["animal", "person", "vehicle"]
LAYOUTS = {
    "voc": (write_voc, 21, 2, 1, [0, 20, 255, 7], VOC),
    "ade20k": (write_ade20k, 150, 2, 1, [255, 0, 149, 1], ADE20K),
    "coco-things": (write_coco, 3, 20, 1, [1, 2, 0, 255], THINGS),
    "coco-stuff": (write_coco, 2, 20, 1, [255, 1, 0, 255], ["ground", "textile"]),
    "folder": (write_folder, 2, 4, 4, [255] * 4, ["class 0", "class 3"]),
}


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command line on tmp_path/data; return status, results.json, stdout and stderr."""

    def run(flags=""):
        argv = f"--data {tmp_path}/data --out {tmp_path}/out --backbone tiny --size 57 --workers 0"
        try:
            status = eval_seg.main(f"{argv} --epochs 1 {flags}".split())
        except SystemExit as stop:
            status = stop.code
        file = tmp_path / "out/results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        return status, results, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_listed_and_evaluated(tmp_path, evaluate, name):
    write, *counts, first_row, labels = LAYOUTS[name]
    write(tmp_path / "data")
    train, val, classes = eval_seg.load_dataset(name, tmp_path / "data")
    assert [len(classes), len(train), len(val)] == counts
    assert not {image for image, *_ in train} & {image for image, *_ in val}
    assert all(image.stem == mask.stem for image, mask, _ in train + val)
    _, mask, values = val[-1]
    assert eval_seg.read_mask(mask, values)[0, :4].tolist() == first_row

    status, results, out, _ = evaluate(f"--dataset {name} --pictures 1")
    assert status == 0
    assert f"{counts[0]} classes, {counts[1]} images" in out
    assert "trainaug" not in out
    for method in eval_seg.PROTOCOLS:
        scores = results[method]["none"]
        mean = scores.pop("mIoU")
        assert list(scores) == labels
        assert mean == pytest.approx(np.mean(list(scores.values())))


@pytest.mark.parametrize("name", ["ade20k", "coco-things", "coco-stuff", "folder"])
def test_no_folder_is_listed_for_every_image(tmp_path, monkeypatch, name):
    LAYOUTS[name][0](tmp_path)
    listings = [spy(how, monkeypatch.setattr, Path) for how in ("iterdir", "glob")]
    eval_seg.load_dataset(name, tmp_path)
    assert sum(map(len, listings)) <= 2


def test_voc_without_trainaug_says_what_is_missing(tmp_path, capsys):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").unlink()
    train, *_ = eval_seg.load_dataset("voc", tmp_path)
    assert [mask.parent.name for _, mask, _ in train] == ["SegmentationClass"]
    out = capsys.readouterr().out
    assert all(word in out for word in ("1,464", "SBD", "SegmentationClassAug.zip", "trainaug.txt"))


def test_masks_and_images_stay_in_step_through_random_crops(tmp_path):
    """Pixels hold their column, in image and mask: after any crop they must agree."""
    columns = np.resize(np.arange(100), (120, 100))
    item = tmp_path / "image.png", tmp_path / "mask.png", {n: n for n in range(256)}
    write_image(item[0], np.stack([2 * columns] * 3, -1))
    write_image(item[1], columns)
    images, masks = eval_seg.read_batch([item], 80, 50)
    assert images.shape == (1, 3, 80, 80)
    assert images.max() >= 196
    assert masks[0, 0].tolist() == list(range(1, 101, 2))  # the nearest of the whole mask
    torch.manual_seed(3)
    images, masks = eval_seg.read_batch([item] * 16, 80, 80, crop=True)
    assert (images[:, 0] / 2 - masks).abs().max() < 1.6
    left = masks[:, 0, 0].int()
    right = masks[:, 0, -1].int()
    assert (left > right).any()  # flipped
    assert (left < right).any()
    assert len(left.unique()) > 8
    assert (left - right).abs().min() >= 0.68 * 100  # all large


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_normalised_images_in_evaluation_mode(precision):
    images = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)
    features = eval_seg.features_of(MeanColour().train(), images, precision)
    expected = [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert features.shape == (1, 3, 2, 2)
    assert features.dtype == torch.float32
    assert features[0, :, 0, 1].tolist() == pytest.approx(expected, rel=0.01)


def test_iou_against_a_slow_count():
    masks, predictions = normal(2, 3, 20, 20).mul(2).abs().long().clamp(max=3)
    masks[masks == 3] = 255
    predictions[predictions == 3] = 4  # class 4 is predicted and never true; class 3 is neither
    expected = {}
    for n, name in enumerate("abc"):
        true = masks == n
        predicted = (predictions == n) & (masks != 255)
        both = (true & predicted).sum()
        expected[name] = 100 * both.item() / (true | predicted).sum().item()
    expected["mIoU"] = sum(expected.values()) / 3
    batches = zip(predictions.split(2), masks.split(2))
    found = eval_seg.evaluate(lambda features: features, batches, list("abcde"))
    assert found == pytest.approx(expected)


class LargestResult(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("n, chunk", [(30, 64), (77, 8), (5000, 600), (5000, 2**14)])
def test_search_finds_the_neighbours_of_a_full_sort(n, chunk):
    memory = normal(n, 8).float()
    queries = normal(70, 8, seed=1).float()
    memory[n // 2 :] *= 1.5  # the best lie crowded
    with LargestResult() as largest:
        values, indices = eval_seg.search(queries, memory, 30, chunk)
    order = (queries @ memory.T).sort(descending=True)
    assert_close(values, order.values[:, :30])
    assert torch.equal(indices, order.indices[:, :30])
    assert largest.elements <= max(70 * (chunk + 60), memory.numel())  # never all products


def test_bounded_memory_keeps_the_rare_class():
    labels = torch.zeros(100, 3)
    labels[:90, 0] = 1
    labels[90:92, 1] = 1  # rare; 92 to 99 have no label
    for seed in range(30):
        chosen = eval_seg.choose_patches(labels, 12, normal(100, seed=seed).sigmoid())
        assert len(chosen.unique()) == 12
        assert {90, 91} <= set(chosen.tolist())
        assert chosen.max() < 92
    assert len(eval_seg.choose_patches(labels, 99, torch.ones(100))) == 92
    mixed = torch.tensor([[1.0, 0], [1, 0], [0.5, 0.5], [0, 1]])  # scores u * 3, 3, 5, 2
    chosen = eval_seg.choose_patches(mixed, 2, torch.tensor([0.5, 0.6, 0.28, 0.9]))
    assert sorted(chosen.tolist()) == [0, 2]


def test_memory_is_bounded_and_drawn_by_the_seed():
    batch = normal(4, 3, 7, 7), torch.zeros(4, 28, 28)
    one, _ = eval_seg.collect_patches([batch], 4, 2, 30, 0)
    same, _ = eval_seg.collect_patches([batch], 4, 2, 30, 0)
    other, _ = eval_seg.collect_patches([batch], 4, 2, 30, 1)
    assert one.shape == (4 * 7, 3)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_is_not_held_twice():
    def resident(field):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) / 1e3

    masks = torch.zeros(2, 32, 32)
    batches = ((torch.randn(2, 1024, 8, 8), masks) for _ in range(120))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    features, _ = eval_seg.collect_patches(batches, 240, 2, 10**6)
    assert features.numel() * 4 / 1e6 == pytest.approx(63, abs=1)
    assert resident("VmHWM") - before < 90


def test_in_context_against_a_plain_loop_over_neighbours(monkeypatch):
    """Memory, neighbours, votes and pixels, counted one by one, for images of 8 x 8 patches."""
    features, queries = normal(2, 3, 3, 8, 8).float()
    masks = normal(3, 32, 32).abs().long()
    masks[masks > 1] = 255
    masks[:, :8, :16] = 255  # eight patches without a label
    monkeypatch.setattr(eval_seg, "patch_features", lambda *_: [(features, masks)])
    args = argparse.Namespace(memory=10**6, seed=0)
    predict = eval_seg.in_context(None, "abc", 2, 32, args)

    memory, labels = [], []
    places = list(itertools.product(range(3), range(8), range(8)))
    for n, y, x in places:
        pixels = masks[n, 4 * y :, 4 * x :][:4, :4]
        pixels = pixels[pixels != 255]
        if len(pixels):
            memory.append(features[n, :, y, x])
            labels.append(pixels.float().mean())  # the share of class 1
    memory = torch.stack(memory)
    labels = torch.stack(labels)
    votes = torch.zeros(3, 1, 8, 8)
    for n, y, x in places:
        similarity = F.cosine_similarity(memory, queries[n, :, y, x], dim=-1)
        nearest = similarity.argsort(descending=True)[:30]
        weights = (similarity[nearest] / 0.02).exp()
        votes[n, 0, y, x] = weights @ labels[nearest] / weights.sum()
    expected = F.interpolate(votes, (32, 32), mode="bilinear")[:, 0] > 0.5
    assert (predict(queries) == expected).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("steps", [1, 5, 7, 25])
def test_sgd_probe_against_a_plain_loop(steps):
    features = normal(steps, 2, 3, 4, 4, seed=steps)
    masks = normal(steps, 2, 4, 4).mul(2).abs().long()
    masks[masks > 2] = 255
    probe = torch.nn.Conv2d(3, 3, 1, bias=False).double()
    weight = probe.weight.detach().flatten(1).clone()
    eval_seg.train_probe(probe, zip(features, masks), steps)
    slow = 0  # the momentum
    for step, (x, y) in enumerate(zip(features.movedim(2, -1), masks)):
        x, y = x[y != 255], y[y != 255]
        error = (x @ weight.T).softmax(1) - F.one_hot(y, 3)
        gradient = error.T @ x / len(y)
        slow = 0.9 * slow + gradient + 1e-4 * weight
        rate = 0.01 if step < 0.8 * steps else 0.001
        weight = weight - rate * slow
    assert_close(probe.weight.flatten(1), weight, **exact)


def test_solved_probe_leaves_nothing_to_learn():
    """The gradient vanishes at its end, and scale and shift of the features do not matter."""
    x = (normal(20_000, 12) @ normal(12, 12, seed=2)).float()  # correlated: many iterations
    labels = (x[:, :3] + 2 * x[:, 3:6]).softmax(1).round(decimals=1)
    scores = []
    scaled = x * torch.logspace(-3, 2, 12) + torch.arange(12)
    for seen in (x, scaled, x.half()):  # half precision, as on a GPU
        layer = torch.nn.Conv2d(12, 3, 1)
        eval_seg.solve_probe(layer, seen, labels.to(seen.dtype))
        found = layer(seen[:, :, None, None].float()).flatten(1)
        scores.append(found.softmax(1))
    error = labels.sum(1, keepdim=True) * scores[0] - labels
    gradient = x.T @ error / len(x)
    assert gradient.abs().max() < 1e-4
    assert_close(scores[1], scores[0], rtol=0, atol=2e-3)
    assert_close(scores[2], scores[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize("dataset", ["folder", "voc"])
def test_probe_reads_upsampled_features(tmp_path, dataset, monkeypatch):
    write_folder(tmp_path)
    train, *_ = eval_seg.load_dataset("folder", tmp_path)
    layer = torch.nn.Conv2d(3, 2, 1)
    monkeypatch.setattr(torch.nn, "Conv2d", lambda *sizes, **more: layer)
    flags = dict(dataset=dataset, memory=10**6, seed=0, epochs=1, workers=0)
    args = argparse.Namespace(**flags, precision="fp32", device="cpu")
    predict = eval_seg.linear(MeanColour(), train, 2, 56, args)
    features = torch.randn(2, 3, 7, 7)
    scores = layer(F.interpolate(features, (100, 100), mode="bilinear"))
    assert (predict(features) == scores.argmax(1)).float().mean() > 0.999  # but for ties


def test_train_is_learned_from_and_val_is_only_predicted(tmp_path, evaluate, monkeypatch):
    calls = spy("patch_features", monkeypatch.setattr, eval_seg)
    write_coco(tmp_path / "data")
    evaluate("--dataset coco-stuff --epochs 2 --pictures 0")
    read = []
    for call in calls:
        items = call["items"]
        folder = items[0][0].parent.name
        crop = call.get("crop", False)
        read.append((len(items), folder, call["size"], call["mask_size"], crop))
    epoch = (2, "train2017", 56, 100, True)  # a tenth of the images, at random
    assert read == [
        (20, "train2017", 56, 56, False),
        (1, "val2017", 56, 56, False),
        epoch,
        epoch,
        (1, "val2017", 56, 100, False),
    ]


def test_defaults_are_those_of_the_protocols(monkeypatch):
    monkeypatch.setattr(eval_seg, "compare", vars)
    args = eval_seg.main(["--data", "here"])
    assert (args["memory"], args["epochs"], args["size"]) == (10_240_000, 25, None)
    sizes = {name: sizes for name, (_, *sizes) in eval_seg.PROTOCOLS.items()}
    assert sizes == {"in-context": [518, None], "linear": [448, 100]}
    assert eval_seg.retrieve.__defaults__ == (30, 0.02)


def test_feature_colours_follow_the_main_directions_of_variance():
    features = torch.zeros(2, 5, 3, 3)
    features[1, 2], features[:, 4, 0] = 9.0, 1.0  # image against image; first row against others
    colours = eval_seg.feature_colours(features).int()
    assert (colours[0, 0] - colours[1, 0]).abs().min() >= 254
    assert (colours[:, 1, 0] - colours[:, 1, 1]).abs().min() >= 254
    assert torch.equal(colours[:, 1, 1], colours[:, 1, 2])


def test_classes_have_colours_of_their_own_and_the_picture_names_them(monkeypatch):
    colours = eval_seg.PALETTE[:150].double()
    apart = torch.cdist(colours, colours, p=1)
    assert apart.diagonal(1).min() > 100  # neighbours
    assert apart.fill_diagonal_(100).min() > 4
    texts = spy("text", monkeypatch.setattr, eval_seg.ImageDraw.ImageDraw)
    images = torch.zeros(1, 3, 294, 294)
    eval_seg.make_sheet({"image": images}, ["sky", "tree"])
    fills = {call["text"]: call.get("fill") for call in texts}
    assert fills["tree"] == tuple(colours[1].tolist())


def test_similarity_is_to_the_middle_patch_of_this_map_and_in_the_next():
    maps = normal(3, 5, 4, 6)
    here, there = eval_seg.similarities(maps)
    for n, following in (0, 1), (1, 2), (2, 0):
        both = maps[[n, following]]
        cosines = F.cosine_similarity(both, maps[n, :, 2, 3, None, None], dim=1)
        low = cosines.min()
        assert_close(torch.stack([here[n], there[n]]), (cosines - low) / (1 - low))


@pytest.fixture
def two_weights(tmp_path):
    """Flags for random weights and for others, in a file."""
    torch.save(neco.load_backbone("tiny").model.state_dict(), tmp_path / "other.pth")
    return f"--weights none {tmp_path}/other.pth"


def test_photographs_without_masks_become_a_picture(tmp_path, evaluate, two_weights):
    for n in range(5):  # the first is 300 times as wide as high
        pixels = np.full((3 + 20 * n, 900 - 200 * n, 3), 40 * n)
        write_image(tmp_path / f"data/deep/{n}.jpg", pixels)
    write_image(tmp_path / "out/results.json", b"{1}")
    status, results, *_ = evaluate(f"{two_weights} --pictures 3")
    assert status == 0
    assert not results  # those of an old evaluation are gone
    picture = np.asarray(Image.open(tmp_path / "out/picture.png")).astype(int)
    assert picture.shape == (12 + 3 * 300, 7 * 300 + 150, 3)
    middles = picture[150::300, 150, 0]
    assert np.abs(middles - [0, 40, 120]).max() < 3  # spread over the folder
    red, _, blue = picture[12 + 180, 600 + 180]
    assert blue - red > 170  # the patch in the middle of the first


def test_results_of_the_first_method_outlive_the_second(tmp_path, evaluate, monkeypatch):
    write_folder(tmp_path / "data")
    monkeypatch.setattr(eval_seg, "solve_probe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert "in-context" in results
    assert "linear" not in results


def test_two_weights_end_to_end(tmp_path, evaluate, two_weights):
    write_folder(tmp_path / "data")
    status, results, out, _ = evaluate(f"{two_weights} --pictures 2")
    assert status == 0
    table = [re.sub(r"[ (]+", " ", line) for line in out.splitlines()]
    weights = two_weights.split()[-1]
    for method in eval_seg.PROTOCOLS:
        none = results[method]["none"]["mIoU"]
        other = results[method][weights]["mIoU"]
        assert f"mIoU {none:.2f} +0.00) {other:.2f} {other - none:+.2f})" in table
        assert none > 70  # two plain colours
    picture = Image.open(tmp_path / "out/picture.png")
    assert picture.size == (10 * 300 + 150, 12 + 2 * 300)

    flags = f"--data {tmp_path}/data --backbone tiny --size 56 --workers 1 --out {tmp_path}"
    command = [sys.executable, eval_seg.__file__, *flags.split(), "--weights", weights]
    subprocess.run(command, check=True)  # alone, the second gets the same figures
    again = json.loads((tmp_path / "results.json").read_text())
    for method in eval_seg.PROTOCOLS:
        assert again[method][weights] == results[method][weights]


BLANK = np.full((56, 56), 255)
BINARY = np.eye(56) * 255
REFUSED_FLAGS = {  # for a folder: words of the sentence
    "--data gone": "gone",
    "--dataset voc": "Segmentation/train.txt is missing.*VOCtrainval",
    "--size 0": "--size.* 0 ",
    "--memory 0": "--memory.* 0 ",
    "--epochs -1": "--epochs.* -1 ",
    "--pictures -1": "--pictures.* -1 ",
    "--weights none gone.pth": "--weights gone.pth",
    "--weights {root}/nan.pth": "--weights.*not finite",
    "--out {root}/val/masks/0.png": "val/masks/0.png",
    "--data {root}/val/masks --pictures 0": "neither train and val, nor",
}
REFUSED_FILES = [  # a layout, files of it, what they hold instead or None, words of the sentence
    ("folder", "val/masks/0.png", None, "data/val/masks/0.png is missing"),
    ("folder", "val/masks/1.png", stripes(0, 3), "val/images/1.png.*differ in size"),
    ("folder", "val/masks/1.png", np.ones((56, 56, 4)), "val/masks/1.png holds 65793.*RGB"),
    ("folder", "val/masks/2.png", b"nothing", "val/masks/2.png cannot be read"),
    ("folder", "val/images/3.png", b"nothing", "val/images/3.png cannot be read"),
    ("folder", "train/masks/*", BLANK, "training masks hold no labelled"),
    ("folder", "val/masks/*", BLANK, "validation masks hold no labelled"),
    ("folder", "*/masks/*", BINARY, "classes ..class 0..; 255 means no label"),
    ("folder", "*/masks/*", BLANK, "classes ..; 255 means no label"),
    ("voc", "SegmentationClass/c.png", stripes(0, 33), "SegmentationClass/c.png holds 33"),
    ("voc", "JPEGImages/c.jpg", None, "JPEGImages/c.jpg is missing.*VOCtrainval"),
    ("voc", "ImageSets/Segmentation/val.txt", b"", "data has no images"),
    ("ade20k", "objectInfo150.txt", None, "objectInfo150.txt is missing.*ADEChallengeData"),
    ("coco-things", "val2017/val20170.jpg", None, "val20170.jpg is missing.*val.*2017.zip"),
    ("coco-things", "annotations/panoptic_val2017.json", None, "missing.*panoptic_annot"),
    ("coco-things", "annotations/panoptic_val2017.json", b'{"a', "val2017.json cannot be read"),
    ("coco-things", "annotations/panoptic_val2017.json", b"{}", "val2017.json.*'categories'"),
    ("coco-stuff", "annotations/stuff_val2017.json", b"[]", "stuff_val2017.json.*TypeError"),
]


def assert_refused(outcome, words):
    status, results, _, err = outcome
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert not results
    assert last.startswith("eval_seg.py: error: ")
    assert re.search(words, last), last


@pytest.mark.parametrize("flags", REFUSED_FLAGS)
def test_a_bad_flag_is_one_sentence_and_status_2(tmp_path, evaluate, flags):
    write_folder(tmp_path / "data")
    state = neco.TinyViT().state_dict()
    torch.save({key: math.nan * x for key, x in state.items()}, tmp_path / "data/nan.pth")
    outcome = evaluate(flags.format(root=tmp_path / "data"))
    assert_refused(outcome, REFUSED_FLAGS[flags])


@pytest.mark.parametrize("layout, files, content, words", REFUSED_FILES)
def test_a_bad_file_is_one_sentence_and_status_2(tmp_path, evaluate, layout, files, content, words):
    LAYOUTS[layout][0](tmp_path / "data")
    for path in list((tmp_path / "data").glob(files)):
        path.unlink()
        if content is not None:
            write_image(path, content)
    assert_refused(evaluate(f"--dataset {layout} --workers 1"), words)
