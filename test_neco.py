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
import re
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

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


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(outputs, x):
    """Gradient of a fixed random sum of the outputs."""
    total = sum((normal(*y.shape, seed=1).to(y.dtype) * y).sum() for y in outputs)
    return torch.autograd.grad(total, x, retain_graph=True)[0]


# ----------------------------------------------------------------------------- sorting and loss


def comparators(size):
    """The bitonic network of 2^k wires: compare mirror images, then merge, block by block."""
    for block in (2**k for k in range(1, size.bit_length())):
        for start in range(0, size, block):
            yield from ((start + i, start + block - 1 - i) for i in range(block // 2))
        for half in (2**k for k in reversed(range(block.bit_length() - 2))):
            yield from ((i, i + half) for i in range(size) if i % (2 * half) < half)


def slow_sort(x, steepness):
    """The definition for one vector: comparator after comparator, on values and on the identity."""
    virtual = [None] * (2 ** math.ceil(math.log2(len(x))) - len(x))  # smallest, in front already
    values, rows = virtual + list(x), virtual + list(torch.eye(len(x), dtype=x.dtype))
    for lo, hi in comparators(len(values)):
        if values[lo] is not None:
            alpha = 0.5 + torch.atan(steepness * (values[hi] - values[lo])) / math.pi
            for wires in (values, rows):
                a, b = wires[lo], wires[hi]
                wires[lo], wires[hi] = alpha * a + (1 - alpha) * b, (1 - alpha) * a + alpha * b
    return torch.stack(values[len(virtual) :]), torch.stack(rows[len(virtual) :])


def test_a_steep_soft_sort_is_a_sort_for_every_n():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 257):
        x = torch.rand(3 + 64 // n, n, generator=generator).argsort(-1).double()
        expected = x.sort(-1).values, F.one_hot(x.argsort(-1), n).double()
        assert_close(neco.soft_sort(x, 1e15), expected, **exact)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 22, 32, 38, 43, 49, 54, 64])
def test_soft_sort_equals_the_definition_and_diffsort_with_gradient(n):
    x = normal(2, n, seed=n).requires_grad_()
    values, permutation = fast = neco.soft_sort(x, 20.0)
    ours = [*fast, gradient(fast, x)]
    slow = [torch.stack(both) for both in zip(*(slow_sort(row, 20.0) for row in x))]
    assert_close(ours, [*slow, gradient(slow, x)], **exact)
    for dim in (-1, -2):
        assert_close(permutation.sum(dim), torch.ones(2, n).double(), **exact)
    assert_close(values, (permutation @ x[..., None])[..., 0], **exact)
    if n < 6:
        assert torch.autograd.gradgradcheck(lambda x: neco.soft_sort(x, 3.0), x)
    if n in (2, 4, 8, 16, 32, 49, 64):
        network = pytest.importorskip("diffsort").DiffSortNet("bitonic", n, steepness=20.0)
        values, permutation = network(x)
        theirs = values, permutation.mT  # which is [item, rank]
        assert_close(ours, [*theirs, gradient(theirs, x)], **exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    with torch.inference_mode():
        neco.soft_sort(normal(300))  # what it keeps of that has to serve for training
    x = normal(2, 3, 300, dtype=dtype).requires_grad_()
    inputs = [y.requires_grad_() for y in features(dtype=dtype)]
    expected = *neco.soft_sort(x.float()), neco.neco_loss(*(y.float() for y in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        results = *neco.soft_sort(x), neco.neco_loss(*inputs)
    assert_close(results, expected, rtol=0, atol=0)  # which are float32
    assert gradient(results[:2], x).any() and gradient(results[2:], inputs[0]).any()


def features(batch=2, patches=3, references=6, dim=5, dtype=torch.float64):
    """Features of student, teacher, alike but for noise, and references; none normalised."""
    student = 3 * normal(batch, patches, dim, seed=1)
    teacher = student + normal(batch, patches, dim, seed=2)
    return [t.to(dtype) for t in (student, teacher, normal(batch, references, dim, seed=3))]


def slow_loss(student, teacher, references, steepness=100.0, teacher_steepness=None):
    """The definition, image by image and patch by patch."""
    losses = []
    for image_of_student, image_of_teacher, drawn in zip(student, teacher, references):
        for patch, other in zip(image_of_student, image_of_teacher):
            x, y = (F.cosine_similarity(z[None], drawn) for z in (patch, other))
            _, p = slow_sort(x, steepness)
            _, q = slow_sort(y, teacher_steepness or steepness)
            losses.append(-(q * p.log()).sum(0).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("references", [2, 6, 7])
@pytest.mark.parametrize("steepness", [(), (7.0,), (7.0, 30.0)])
def test_loss_equals_the_definition_with_gradient(references, steepness):
    student, teacher, drawn = (x.requires_grad_() for x in features(references=references))
    loss = neco.neco_loss(student, teacher, drawn, *steepness)
    expected = slow_loss(student, teacher, drawn, *steepness)
    (3 * loss).backward()
    right = torch.autograd.grad(3 * expected, student)[0]
    assert_close([loss, student.grad], [expected, right], **exact)
    assert teacher.grad is None and drawn.grad is None
    assert_close(neco.neco_loss(100 * student, 0.01 * teacher, 7 * drawn, *steepness), loss)
    with pytest.raises(ValueError, match="teacher"):
        neco.neco_loss(student, teacher[:, :2], drawn)


@pytest.mark.parametrize("steepness", [1e-6, 100.0, 1e30])
def test_loss_of_many_rows_is_their_mean_in_both_precisions(steepness):
    # computed in blocks of rows, of which these 700 are several
    student, teacher, drawn = features(batch=7, patches=100, references=49, dim=8)
    student.requires_grad_()
    loss = neco.neco_loss(student, teacher, drawn, steepness)
    single = neco.neco_loss(student.float(), teacher.float(), drawn.float(), steepness)
    right, grad = (torch.autograd.grad(x, student)[0] for x in (loss, single))
    assert loss.isfinite() and single.isfinite() and grad.isfinite().all()
    if steepness == 100:
        x, y = (F.cosine_similarity(z[:, :, None], drawn[:, None], -1) for z in (student, teacher))
        plain = -(neco.soft_sort(y)[1] * neco.soft_sort(x)[1].log()).sum(-2).mean()
        assert_close([loss, right], [plain, torch.autograd.grad(plain, student)[0]], **exact)
        assert_close(single.double(), loss, rtol=1e-5, atol=0)
        assert (grad - right).norm() < 1e-3 * right.norm()  # P near 1e-7 has few digits


def test_floor_is_the_entropy_of_the_teachers_ranking_and_ignorance_costs_log_r():
    student, teacher, references = features()
    entropy = slow_loss(teacher, teacher, references, 50.0)
    assert neco.neco_loss(student, teacher, references, 10.0, 50.0) > entropy
    student = teacher.clone().requires_grad_()
    floor = neco.neco_loss(student, teacher, references, 50.0)
    assert_close(floor, entropy)
    assert torch.autograd.grad(floor, student)[0].abs().max() < 1e-10
    # At right angles to all references, comparators mix by halves: every entry of P is 1 / R.
    for count in (1, 2, 8, 32):
        student = F.pad(torch.zeros(2, 3, 4).double(), (0, 1), value=2.0)
        loss = neco.neco_loss(student, teacher, F.pad(normal(2, count, 4), (0, 1)))
        assert loss.item() == pytest.approx(math.log(count), rel=1e-12)


# --------------------------------------------------------------------------------------- views


def picture(width=96, height=72, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def area(*boxes):
    """What boxes (left, top, right, bottom) share."""
    low, high = np.max(boxes, axis=0)[:2], np.min(boxes, axis=0)[2:]
    return np.maximum(high - low, 0).prod()


def test_boxes_overlap_and_keep_their_share_of_the_image():
    torch.manual_seed(0)
    for width, height in ((640, 480), (450, 600)):
        drawn = [neco.random_boxes(torch.zeros(3, height, width), 4) for _ in range(300)]
        left, top, right, bottom = np.array(drawn).transpose(2, 0, 1)  # (300, 6) each
        assert [left.min(), top.min(), right.max(), bottom.max()] == [0, 0, width, height]
        w, h, whole = right - left, bottom - top, width * height  # rounded to whole pixels
        assert ((w + 0.5) / (h - 0.5)).min() >= 3 / 4 and ((w - 0.5) / (h + 0.5)).max() <= 4 / 3
        for share, low, high in ((w * h)[:, :2], 0.25, 1.0), ((w * h)[:, 2:], 0.05, 0.25):
            edge, least, most = (high - low) / 10, share.min() / whole, share.max() / whole
            assert low - 0.003 < least < low + edge and high - edge < most < high + 0.003
        assert 0.02 * whole < min(area(*boxes[:2]) for boxes in drawn) < 0.2 * whole
        assert min(area(g, v) for boxes in drawn for g in boxes[:2] for v in boxes) > 0.01 * whole
    for size in ((1000, 3), (3, 1000), (1, 5000), (1, 1), (2, 1), (2, 2)):  # it ends
        boxes = neco.random_boxes(torch.zeros(3, *size), 4)
        assert len(boxes) == 6 and all(area(boxes[g], box) > 0 for g in (0, 1) for box in boxes)


def test_views_show_their_boxes_and_follow_the_seed(monkeypatch):
    def views(seed, image, local_crops=3):
        torch.manual_seed(seed)
        made = neco.make_views(image, 56, 28, local_crops)
        return *itertools.chain(*made["crops"]), made["boxes"]

    coloured, again, other = (views(seed, picture()) for seed in (5, 5, 6))
    for a, b, c in zip(coloured, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    monkeypatch.setattr(neco, "change_colours", lambda crop: crop)
    assert not torch.equal(coloured[0], views(5, picture())[0])
    for image, local_crops in ((picture(), 3), (picture(), 0), (picture(1, 1), 2)):
        *crops, boxes = views(5, image, local_crops)
        assert [crop.shape[1] for crop in crops] == [56, 56] + [28] * local_crops
        for crop, (left, top, right, bottom) in zip(crops, boxes.int().tolist(), strict=True):
            expected = tvf.to_pil_image(image[:, top:bottom, left:right])
            expected = tvf.pil_to_tensor(expected.resize(crop.shape[1:], Image.BILINEAR))
            assert crop.dtype == torch.uint8 and (crop.int() - expected.int()).abs().max() <= 2


def test_align_reads_the_same_places_from_both_crops():
    def places(low, high, n):
        steps = (torch.arange(n).double() + 0.5) / n
        return low + torch.cartesian_prod(steps, steps).flip(1) * (high - low)  # (n * n, 2)

    # Feature maps hold the places of their patches in the image. RoI-align interpolates, and has
    # no neighbour to read from within half a patch of a crop's edge.
    for _ in range(20):
        boxes = torch.tensor(neco.random_boxes(torch.zeros(3, 192, 256), 1)).double()[[0, 2]]
        low, high = boxes[:, :2].amax(0), boxes[:, 2:].amin(0)
        expected, region = places(low, high, 7), torch.cat([low, high])[None]
        for box in boxes:
            maps, patch = places(box[:2], box[2:], 8).T.view(1, 2, 8, 8), (box[2:] - box[:2]) / 8
            error = (neco.align(maps, box[None], region, 7)[0] - expected).abs()
            margin = patch / 2 + (high - low) / 14
            inside = (expected > box[:2] + margin) & (expected < box[2:] - margin)
            assert (error < patch / 2).all() and inside.any() and error[inside].max() < 1e-9


def test_colours_change_as_torchvisions():
    jitter = transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    blur = transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5)
    public = transforms.Compose([jitter, transforms.RandomGrayscale(0.2), blur])
    image, measured = tvf.to_pil_image(picture(6, 6) // 2 + 64).resize((24, 24)), []
    for change in (neco.change_colours, public):
        torch.manual_seed(0)
        x = torch.stack([tvf.pil_to_tensor(change(image)) for _ in range(800)]) / 255
        chroma, same = x.amax(1) - x.amin(1), x == x.mode(0).values
        parts = x, x[:, 0], (x - 0.5) ** 2, chroma, x.diff(dim=2).abs(), chroma == 0, same
        measured.append(torch.stack([part.float().flatten(1).mean(1) for part in parts]))
    error = 4 * (sum(rows.var(1) for rows in measured) / 800).sqrt()
    for statistic in (torch.mean, torch.std):
        ours, theirs = (statistic(rows, dim=1) for rows in measured)
        assert ((ours - theirs).abs() < error).all()


def test_images_of_all_modes_become_rgb(tmp_path):
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    colour, greys = np.stack([ramp, ramp[::-1], ramp.T], axis=2), np.stack([ramp] * 3, axis=2)
    grey, image, wide = Image.fromarray(ramp), Image.fromarray(colour), ramp.astype(np.uint16)
    palette, turn = image.quantize(256), Image.Exif()
    turn[0x0112] = 6  # orientation: turn it by a quarter, clockwise
    for name, saved, expected in (
        ("palette.png", palette, np.array(palette.convert("RGB"))),
        ("rgba.png", Image.merge("RGBA", [*image.split(), grey]), colour),
        ("one.png", grey.point(lambda v: 255 * (v > 99)).convert("1"), 255 * (greys > 99)),
        ("cmyk.tif", image.convert("CMYK"), colour),
        ("wide.png", Image.fromarray(wide * 257), greys),
        ("wide.tif", Image.fromarray(wide), 0 * greys),
        ("turned.png", image, np.rot90(colour, -1)),
    ):
        saved.save(tmp_path / name, exif=turn if name == "turned.png" else Image.Exif())
        result = neco.read_image(tmp_path / name).permute(1, 2, 0).numpy()
        assert result.dtype == np.uint8 and result.shape == (8, 8, 3), name
        assert np.abs(result.astype(int) - expected).max() <= 1, name


def test_images_are_found_at_any_depth_and_no_pipes(tmp_path):
    names = ["b/ü é.JPG", "b/c/x.jpeg", "a.PNG", "z.webp", "B.bmp", "b/c/日本.tif", "b.Tiff"]
    others = ["notes.txt", "b/labels.json", "jpg", "c.jpg.part", "../elsewhere/x.png"]
    data = tmp_path / "data"
    for name in names + others:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    os.mkfifo(data / "pipe.jpg")  # whoever opens it waits for ever
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    found = [os.path.relpath(os.fsdecode(name), data) for name in neco.find_images(str(data))]
    assert found == sorted([*names, "linked/x.png"], key=os.fsencode)


# ------------------------------------------------------------------------------------- training

HUB = """
import torch
from torch import nn

class DinoV2(nn.Module):  # tokens are the mean colours of patches of 4 x 4 pixels, plus a bias
    patch_size, embed_dim = 4, 3
    def __init__(self, pretrained=True, drop_path_rate=0.0):
        super().__init__()
        self.bias, self.rate = nn.Parameter(torch.full((3,), 7.0 * pretrained)), drop_path_rate
    def get_intermediate_layers(self, images, n=1):
        patches = nn.functional.avg_pool2d(images, 4).flatten(2).mT + self.bias
        tokens = torch.cat([patches[:, :1] + 1e3, patches], dim=1)
        return [tokens[:, 1:] if self.patch_size else tokens]

class Dino(DinoV2):  # has its patch size elsewhere, and a class token in front
    patch_size, patch_embed = None, type("", (), {"patch_size": 4})

def no_drop_path(pretrained=True): return DinoV2(pretrained)
def large_patches(**options): return type("", (DinoV2,), {"patch_size": 16})(**options)
def raising(**options): raise RuntimeError("out\\nof order")
"""
RUN = """--backbone tiny --global-size 56 --local-size 28 --local-crops 2 --batch-size 4 --epochs 3
    --grid 3 --queue 64 --hidden 32 --log-every 1 --save-every 2 --workers 0 --device cpu"""
STATE = {"bias": torch.arange(3.0)}
HEADS = {f"{part}head.0.weight": torch.ones(2, 2) for part in ("", "projection_", "dino_", "ibot_")}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder of images, a hub, a finished run, and things that no run should take."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("images", "empty", "unreadable", "torn", "code"):
        (folder / name).mkdir()
    for i in range(8):
        tvf.to_pil_image(picture(seed=i)).save(folder / "images" / f"{i}.png")
        (folder / "unreadable" / f"{i}.jpg").write_bytes(b"no image")
    (folder / "hubconf.py").write_text(HUB)
    assert neco.main(f"--data {folder}/images --out {folder}/run {RUN}".split()) == 0
    code = {"a pickle can name any function": os.getcwd}
    torch.save({"state_dict": load(folder / "run", "student")} | code, folder / "code.pth")
    torch.save(load(folder / "run", "checkpoint") | code, folder / "code" / "checkpoint.pth")
    torch.save(STATE, folder / "other.pth")
    (folder / "torn" / "checkpoint.pth").write_bytes((folder / "code.pth").read_bytes()[:9999])
    return folder


@pytest.mark.parametrize("name", ["DinoV2", "Dino", "no_drop_path"])
def test_hub_models_give_the_patches_in_their_places(place, tmp_path, monkeypatch, name):
    backbone, image = neco.load_backbone(name, str(place)), picture(20, 12)[None].float()
    assert torch.equal(backbone(image), F.avg_pool2d(image, 4) + 7)  # 7: the hub's own weights
    torch.save({"state_dict": STATE | HEADS}, tmp_path / "published.pth")
    torch.save(STATE, tmp_path / "plain.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for weights in (tmp_path / "plain.pth", f"file://{tmp_path}/published.pth"):
        backbone = neco.load_backbone(name, str(place), str(weights))
        assert torch.equal(backbone(image), F.avg_pool2d(image, 4) + STATE["bias"].view(3, 1, 1))
        rate = 0.1 * name.startswith("Dino")  # of drop path
        assert (backbone.patch_size, backbone.embed_dim, backbone.model.rate) == (4, 3, rate)
        assert backbone.training


@pytest.fixture
def command(capfd, place):
    """Run the command line in this process: flags, later ones count -> exit status and stderr."""

    def call(out, flags="", data=place / "images"):
        try:
            status, message = neco.main(f"--data {data} --out {out} {RUN} {flags}".split()), ""
        except SystemExit as stop:  # Python prints a message, and exits with status 1
            status, message = (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        return status, capfd.readouterr().err + message

    return call


def load(folder, name):
    """A file of a run; "log" has rows of step, loss, floor, learning rate, weight decay."""
    if name == "log":
        return np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1, ndmin=2)
    return torch.load(folder / f"{name}.pth", weights_only=True)


def assert_same_run(a, b):
    """Bit for bit."""
    for name in ("student", "teacher", "checkpoint", "log"):
        for x, y in zip(*(tree_leaves(load(run, name)) for run in (a, b)), strict=True):
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


def test_a_run_leaves_backbones_and_a_log(place):
    for name in ("student", "teacher"):
        neco.TinyViT().load_state_dict(load(place / "run", name), strict=True)
    step, loss, floor, rate, decay = load(place / "run", "log").T
    left = (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    assert step.tolist() == [1, 2, 3, 4, 5, 6] and (floor > 0).all() and (floor < loss).all()
    assert rate == pytest.approx(1e-5 * left, rel=1e-5)
    assert decay == pytest.approx(0.5 - 0.46 * left, rel=1e-5)


def public_loss(student_maps, teacher_maps, boxes, grid, references, *steepness):
    """Loss of a step as the public code has it: for each pair, then for each global crop."""
    losses = []
    for g, v in ((g, v) for g in range(2) for v in range(len(student_maps)) if v != g):
        a, b = boxes[:, g], boxes[:, v]
        shared = torch.cat([a[:, :2].maximum(b[:, :2]), a[:, 2:].minimum(b[:, 2:])], dim=1)
        cells = neco.align(student_maps[v], b, shared, grid)
        targets = neco.align(teacher_maps[g], a, shared, grid)
        losses.append(slow_loss(cells, targets, references[len(losses)], *steepness))
    return torch.stack(losses).view(2, -1).mean(1).mean()


def test_a_step_has_the_loss_of_the_public_code(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        aligned, compared = (spy(name, patch.setattr) for name in ("align_pairs", "neco_loss"))
        convolved = spy("forward", patch.setattr, torch.nn.Conv2d)
        flags = "--steepness 30 --teacher-steepness 60 --accumulate 2 --steps 1"
        assert command(tmp_path, flags)[0] == 0
    losses, steps = [], [call["references"] for call in compared if call["student"].requires_grad]
    for pair in zip(aligned, steps, strict=True):
        maps, references = tree_map_only(torch.Tensor, lambda x: x.detach().double(), pair)
        cells, targets = neco.align_pairs(**maps)
        loss = neco.neco_loss(cells, targets, references, 30.0, 60.0)
        assert_close(loss, public_loss(*maps.values(), references, 30.0, 60.0), **exact)
        assert len(maps["student_maps"]) == 4 and len(maps["teacher_maps"]) == 2
        losses.append([loss, neco.neco_loss(targets, targets, references, 60.0)])
    assert load(tmp_path, "log")[0, 1:3] == pytest.approx(np.mean(losses, axis=0), rel=1e-5)
    std, mean = torch.tensor([[0.229, 0.224, 0.225], [0.485, 0.456, 0.406]])[..., None, None]
    crops = [call["input"] for call in convolved if call["input"].shape[1] == 3]
    for x in (255 * (x * std + mean) for x in crops):  # whole numbers, had they not been normalised
        assert (x - x.round()).abs().max() < 1e-3 and x.min() > -0.1 and 200 < x.max() < 255.1


def test_references_are_drawn_from_a_queue_without_repetition(command, tmp_path, monkeypatch):
    # The teacher stands still. A step adds 10 patches of each of 4 images for each global crop.
    calls, views = (spy(name, monkeypatch.setattr) for name in ("neco_loss", "make_views"))

    def drawn(queue):
        """References of each of four steps and two global crops: pairs * images, sets of 9."""
        calls.clear()
        flags = f"--queue {queue} --seed {queue} --steps 4 --momentum 1"
        assert command(tmp_path / str(queue), flags)[0] == 0
        losses = [call["references"] for call in calls if call["student"].requires_grad]
        halves = [[half.flatten(0, 1).tolist() for half in x.chunk(2)] for x in losses]
        return [[[{*map(tuple, image)} for image in half] for half in step] for step in halves]

    steps = [[set().union(*half) for half in step] for step in drawn(64)]
    assert not steps[0][0] & steps[0][1]
    for g in (0, 1):
        first, second, third, _ = (step[g] for step in steps)
        assert len(first) <= 40 and first & second and not first & third
        assert all(abs(np.linalg.norm(patch) - 1) < 1e-5 for patch in third)
    assert all(image == half[0] for half in drawn(9)[0] for image in half)  # all of the queue
    seen = [call["image"].sum().item() for call in views]
    epochs = {tuple(seen[i : i + 8]) for i in range(0, 32, 8)}  # two of each of two seeds
    assert len(epochs) == 4 and all(len(set(epoch)) == 8 for epoch in epochs)


def test_rates_decay_and_momentum_move_what_they_should(command, tmp_path, monkeypatch, place):
    start = load(place / "run", "student")

    def moved(out, flags, status=0):
        flags = f"--weights {place}/run/student.pth --momentum 0.75 --head-lr 1e-3 {flags}"
        assert command(tmp_path / out, flags)[0] == status
        states = (load(tmp_path / out, name) for name in ("student", "teacher"))
        return ({key: x - start[key] for key, x in state.items()} for state in states)

    # Interrupted after the first of two steps: the teacher follows by 1/4, then by 1/8.
    fast = "--lr 1e-2 --weight-decay 0 0 --steps 2"
    with monkeypatch.context() as patch:
        spy("neco_loss", patch.setattr, action=lambda _: os.kill(os.getpid(), signal.SIGINT))
        student, teacher = moved("run", fast, 130)
    later, last = moved("run", fast)
    decayed, _ = moved("decay", "--lr 1e-2 --weight-decay 5 9 --steps 1")
    for key, value in start.items():
        assert student[key].abs().median() == pytest.approx(1e-2, rel=0.02)  # Adam's first step
        assert_close(teacher[key], 0.25 * student[key], rtol=1e-3, atol=1e-6)
        follows = teacher[key] + 0.125 * (later[key] - teacher[key])
        assert_close(last[key], follows, rtol=1e-3, atol=1e-6)
        shrunk = -5e-2 * value if value.ndim > 1 else 0 * value  # biases do not decay
        assert_close(decayed[key] - student[key], shrunk, rtol=1e-3, atol=1e-5)
    list(moved("still", "--lr 0 --head-lr 0 --weight-decay 0 0 --steps 1"))
    run = load(tmp_path / "still", "checkpoint")["run"]  # both start alike, with their heads
    assert all(torch.equal(run[key], run[key.replace("student", "teacher")]) for key in run)


def test_training_learns_and_leaves_out_files_that_cannot_be_read(command, tmp_path, place):
    data = shutil.copytree(place / "images", tmp_path / "data")
    (data / "cut.png").write_bytes((data / "0.png").read_bytes()[:3000])
    (data / "empty.jpg").touch()
    flags = "--steps 30 --hidden 64 --batch-size 8 --momentum 1 --local-crops 0 --grid 4"
    flags += " --queue 400 --steepness 50 --workers 2"
    status, err = command(tmp_path / "out", f"{flags} --lr 3e-4 --head-lr 3e-4", data)
    assert status == 0 and all("skipped" in line for line in err.splitlines()), err
    assert str(data / "cut.png") in err and str(data / "empty.jpg") in err
    assert command(tmp_path / "still", f"{flags} --lr 0 --head-lr 0", data)[0] == 0
    logs = (load(tmp_path / out, "log").T for out in ("out", "still"))
    learned, still = ((loss - floor)[-10:].mean() for _, loss, floor, *_ in logs)
    assert learned < 0.8 * still
    status, err = command(tmp_path / "flat", "--grid 2 --steepness 1e-3 --steps 1")
    assert status == 0 and "warning" in err and "flat" in err


def run_struck(argv, log, environment, where, call, number):
    """Run neco in a session of its own until a signal strikes it before a call of a function.

    It is forked from a server that has imported neco, as that takes some seconds."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers; here it is the server's
    os.setsid()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    module = neco if where == "neco_loss" else os
    spy(where, setattr, module, lambda calls: len(calls) == call and os.killpg(0, number))
    sys.exit(neco.main(argv.split()))


def start_processes(argv, log, environments=({},), strike=("replace", 0, 0)):
    """Run `run_struck` once for each environment; return the exit statuses, -N for signal N."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neco", "pytest"])
    arguments = [(argv, log, environment, *strike) for environment in environments]
    processes = [context.Process(target=run_struck, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


INTERRUPTIONS = [  # before which call of what, by which signal; exit status; workers, and later
    (("neco_loss", 7, signal.SIGKILL), -9, (0, 2)),  # in step 4, of which 2 are saved
    (("replace", 1, signal.SIGKILL), -9, (1, 0)),  # the first checkpoint is written, not named
    (("replace", 6, signal.SIGKILL), -9, (2, 0)),  # checkpoint of step 4, backbone of step 2
    (("replace", 10, signal.SIGKILL), -9, (0, 0)),  # the same, of the last step
    (("neco_loss", 5, signal.SIGTERM), 143, (1, 2)),
    (("neco_loss", 5, signal.SIGINT), 130, (2, 1)),
]


@pytest.mark.parametrize("strike, status, workers", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_a_whole_one(command, tmp_path, place, strike, status, workers):
    log, out = tmp_path / "log", tmp_path / "out"
    argv = f"--data {place}/images --out {out} {RUN} --workers {workers[0]}"
    statuses, text = start_processes(argv, log, strike=strike), log.read_text()
    assert statuses == [status] and "Traceback" not in text, text
    assert status < 0 or ("stopped at step 3" in text and len(load(out, "log")) == 3)
    assert command(out, f"--workers {workers[1]}")[0] == 0
    assert_same_run(out, place / "run")
    assert not list(out.glob("*.tmp"))


def test_processes_and_accumulation_train_as_one(command, tmp_path, place):
    flags = f"--weights {place}/run/student.pth --steps 4 --lr 1e-3 --momentum 0.5"
    assert command(tmp_path / "one", flags)[0] == 0
    assert command(tmp_path / "parts", f"{flags} --accumulate 4")[0] == 0
    port = str(20000 + os.getpid() % 10000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as by torchrun
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    argv = f"--data {place}/images --out {tmp_path}/two {RUN} {flags} --accumulate 2"
    assert start_processes(argv, tmp_path / "log", ranks) == [0, 0]
    assert (tmp_path / "log").read_text().count("step 4/4") == 1
    for other, name in itertools.product(("parts", "two"), ("student", "teacher")):
        logs = [load(tmp_path / run, "log") for run in (other, "one")]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)
        for key, start in load(place / "run", "student").items():
            moved, right = (load(tmp_path / x, name)[key] - start for x in (other, "one"))
            if key.endswith("in_proj_bias"):  # keys: their gradient is 0, Adam moves by rounding
                moved, right = (x.view(3, -1)[[0, 2]] for x in (moved, right))
            assert (moved - right).norm() < 1e-3 * right.norm(), (other, name, key)


def test_what_was_computed_before_a_failure_is_kept(command, tmp_path, place, monkeypatch):
    out, data = tmp_path / "out", shutil.copytree(place / "images", tmp_path / "data")
    # In step 5, as there are two calls a step, for loss and floor; then in the next step.
    spoil = (lambda calls: [call["student"].data.fill_(math.nan) for call in calls[8:]]), 1, 4
    vanish = (lambda calls: shutil.rmtree(data, ignore_errors=True)), 2, 5
    for (action, status, saved), words in ((spoil, "not finite"), (vanish, "cannot be read")):
        with monkeypatch.context() as patch:
            spy("neco_loss", patch.setattr, action=action)
            found, err = command(out, data=data)
        assert found == status and words in err.splitlines()[-1], err
        assert load(out, "checkpoint")["step"] == saved
    assert command(out)[0] == 0
    assert_same_run(out, place / "run")


# ------------------------------------------------------------------- command line and bad input

RECIPE = """--out runs/neco --backbone dinov2_vits14_reg --epochs 25 --batch-size 64 --accumulate 1
--local-crops 4 --grid 7 --queue 8192 --hidden 2048 --lr 1e-05 --head-lr 0.0001
--weight-decay [0.04, 0.5] --momentum 0.9995 --steepness 100.0 --seed 0 --log-every 50
--save-every 1000"""


def test_defaults_are_the_recipes_and_help_explains_each(monkeypatch, capsys):
    flags = {name: default for name, (_, default, _) in neco.FLAGS.items()}
    assert flags.pop("workers") == min(16, os.cpu_count())
    assert flags.pop("device") in ("cpu", "cuda", None)
    given = [f"--{name} {default}" for name, default in flags.items() if default is not None]
    assert " ".join(given) == RECIPE.replace("\n", " ")
    monkeypatch.setattr(sys, "argv", ["neco.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(neco.__file__, run_name="__main__")
    text = capsys.readouterr().out
    for name in neco.FLAGS:
        assert re.search(rf"^ +--{name} [A-Z{{].*\s+[a-zA-Z0-9].*[a-z]{{2}}", text, re.MULTILINE)
    with pytest.raises(SystemExit, match="2"):
        neco.main(RUN.split())
    assert "--data" in capsys.readouterr().err.splitlines()[-1]


def test_default_crops_are_the_recipes(place, tmp_path, monkeypatch):
    calls = spy("make_views", monkeypatch.setattr, action=lambda calls: 1 / 0)
    for flags in ("--backbone tiny", f"--backbone large_patches --hub {place}"):
        argv = f"--data {place}/images --out {tmp_path} --batch-size 8 --workers 0 {flags}"
        with pytest.raises(ZeroDivisionError):
            neco.main(argv.split())
    assert [list(call.values())[1:] for call in calls] == [[518, 98, 4], [512, 96, 4]]


# Refused, and in the last line of stderr stands what follows "says", else the flags themselves.
REFUSED = """--data HERE/nowhere; --data HERE/other.pth; --data HERE/empty; --data HERE/unreadable;
--data HERE/unreadable --workers 2 says --data HERE/unreadable; --batch-size 9 says --data 8 9;
--batch-size 4 --accumulate 3 says --batch-size 4 3; --global-size 57 says --global-size 57 14;
--local-size 29 says --local-size 29 14; --queue 8 says --queue 8 9 --grid; --steps 2.5;
--weight-decay 0.04 says --weight-decay 2; --precision fp8 says --precision fp8 bf16 fp32;
--device cuda:99; --backbone dinov5 says --backbone dinov5 dinov2_ dinov3_ dino_ tiny;
--backbone x --hub HERE/empty says --hub HERE/empty hubconf.py;
--backbone absent --hub HERE says --hub HERE absent;
--backbone raising --hub HERE says --hub HERE raising out of order;
--backbone dinov2_vits14 says --hub facebookresearch/dinov2 --weights; --weights HERE/nowhere.pth;
--weights file://HERE/nowhere.pth; --weights HERE/code.pth;
--weights HERE/other.pth says --weights HERE/other.pth patch_embed;
--out HERE/other.pth says HERE/other.pth; --out HERE/torn says --out HERE/torn/checkpoint.pth;
--out HERE/code says HERE/code/checkpoint.pth;
--out HERE/run --lr 2e-5 says --out HERE/run lr 1e-05 2e-05;
--out HERE/run --steps 12 says --out HERE/run steps 6 12"""


@pytest.mark.parametrize("case", REFUSED.replace("\n", " ").split("; "))
def test_bad_input_is_named_and_nothing_written_over(command, place, tmp_path, monkeypatch, case):
    def contents():
        return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = contents()
    flags, _, words = case.replace("HERE", str(place)).partition(" says ")
    status, err = command(place / "out", flags)
    assert not multiprocessing.active_children()  # Python would wait for them at its end
    last = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in err and last.startswith("neco.py: error: "), err
    assert [word for word in (words or flags).split() if word not in last] == [], last
    assert contents() == before


def test_the_readmes_example_runs():
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text() if readme.exists() else pytest.skip("no README.md here")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, names := {})
    assert names["loss"].isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(command, tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        inputs = features(30, 30, 49, 16, dtype=torch.float32)
        student, *others = (x.to(device).requires_grad_() for x in inputs)
        loss = neco.neco_loss(student, *others)
        results.append([x.cpu() for x in (loss, *torch.autograd.grad(loss, student))])
    assert_close(*results, rtol=1e-3, atol=1e-5)
    assert command(tmp_path, "--device cuda --precision bf16 --steps 3")[0] == 0
    assert (load(tmp_path, "log")[:, 1] < 9).all()


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


def write_image(path: Path, pixels, palette: bool = False):
    """Write an image; or bytes, which are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, bytes):
        return path.write_bytes(pixels)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette(list(range(256)) * 3)
    return image.save(path)


def stripes(*values: int) -> np.ndarray:
    """A mask (8, 8) whose columns cycle through the values."""
    return np.resize(np.array(values, np.uint8), (8, 8))


GREY = np.full((8, 8, 3), 90)


def write_voc(root: Path) -> None:
    for name in "abc":
        write_image(root / f"JPEGImages/{name}.jpg", GREY)
        write_image(root / f"SegmentationClass/{name}.png", stripes(0, 20, 255, 7), palette=True)
        write_image(root / f"SegmentationClassAug/{name}.png", stripes(0, 15))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, names in {"train": "a", "trainaug": "a\nb\n", "val": "c\n"}.items():
        (lists / f"{split}.txt").write_text(names)


def write_ade20k(root: Path) -> None:
    for name in ("training/a", "training/b", "validation/c"):
        write_image(root / f"images/{name}.jpg", GREY)
        write_image(root / f"annotations/{name}.png", stripes(0, 1, 150, 2))
    rows = [f"{n}\t0.1\t{n}\t7\tthing {n}, alias\n" for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))


def write_coco(root: Path) -> None:
    """Both kinds of annotations; one panoptic id needs more than 16 bits."""
    names = {1: "person", 2: "vehicle", 17: "animal", 92: "textile", 149: "ground", 183: "other"}
    categories = [{"id": i, "supercategory": n, "isthing": i < 92} for i, n in names.items()]
    segments, folder = {70000: 1, 300: 2, 5: 17, 6: 149}, root / "annotations"
    info = [{"id": i, "category_id": category} for i, category in segments.items()]
    pixels = [[i % 256, i // 256 % 256, i // 65536] for i in [*segments, 0]]
    pixels = np.resize(np.array(pixels, np.uint8), (8, 8, 3))
    for split, count in {"train2017": 20, "val2017": 1}.items():
        files = [f"{split}{n}" for n in range(count)]
        for file in files:
            write_image(root / split / f"{file}.jpg", GREY)
            write_image(folder / f"panoptic_{split}/{file}.png", pixels)
            write_image(folder / f"stuff_{split}_pixelmaps/{file}.png", stripes(0, 92, 149, 183))
        annotations = [{"file_name": f"{file}.png", "segments_info": info} for file in files]
        content = {"categories": categories, "annotations": annotations}
        (folder / f"panoptic_{split}.json").write_text(json.dumps(content))
    (folder / "stuff_val2017.json").write_text(json.dumps({"categories": categories[3:]}))


def write_folder(root: Path) -> None:
    """Two colours, classes 0 and 3, left and right of a border that differs between images."""
    rng = np.random.default_rng(0)
    for name in [f"{split}/images/{n}.png" for split in ("train", "val") for n in range(4)]:
        mask = np.where(np.arange(56) < rng.integers(14, 42), 0, np.full((56, 56), 3))
        image = np.where(mask[..., None] == 3, [220, 40, 40], [40, 40, 220])
        mask[:2] = 255
        write_image(root / name, image + rng.integers(-30, 30, image.shape))
        write_image(root / name.replace("images", "masks"), mask)


# How to write it, its number of classes, items to learn from and to predict, the classes in the
# first row of the first and the last mask, and those that occur in the masks to predict.
VOC = ["background", "car", "tvmonitor"]
LAYOUTS = {
    "voc": (write_voc, 21, 2, 1, [0, 15, 0], [0, 20, 255, 7], VOC),
    "ade20k": (write_ade20k, 150, 2, 1, *[[255, 0, 149]] * 2, ["thing 1", "thing 2", "thing 150"]),
    "coco-things": (write_coco, 3, 20, 1, *[[1, 2, 0, 255]] * 2, ["animal", "person", "vehicle"]),
    "coco-stuff": (write_coco, 2, 20, 1, *[[255, 1, 0, 255]] * 2, ["ground", "textile"]),
    "folder": (write_folder, 2, 4, 4, [255, 255], [255, 255], ["class 0", "class 3"]),
}


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command line on tmp_path/data; return status, results.json, stdout and stderr."""

    def run(*flags: str) -> tuple[int, dict, str, str]:
        argv = f"--data {tmp_path}/data --backbone tiny --size 56 --workers 0 --epochs 1".split()
        try:
            status = eval_seg.main([*argv, "--out", f"{tmp_path}/out", *flags])
        except SystemExit as stop:
            status = stop.code
        file = tmp_path / "out/results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_listed_and_evaluated(tmp_path, evaluate, name):
    write, *counts, first, last, labels = LAYOUTS[name]
    write(tmp_path / "data")
    train, val, classes = eval_seg.load_dataset(name, tmp_path / "data")
    assert [len(classes), len(train), len(val)] == counts
    assert not {image for image, *_ in train} & {image for image, *_ in val}
    for (image, mask, values), expected in ((train[0], first), (val[-1], last)):
        assert image.stem == mask.stem
        assert eval_seg.read_mask(mask, values)[0, : len(expected)].tolist() == expected

    status, results, out, _ = evaluate("--dataset", name, "--pictures", "1")
    assert status == 0 and f"{counts[0]} classes, {counts[1]} images" in out
    for method in eval_seg.SIZES:
        scores = results[method]["none"]
        assert list(scores) == [*labels, "mIoU"]
        assert scores.pop("mIoU") == pytest.approx(sum(scores.values()) / len(scores))
    assert f"over the {len(labels)} classes" in out and "trainaug" not in out
    assert ("count 151 classes" in out) == (name in ("voc", "ade20k"))
    picture = Image.open(tmp_path / "out/picture.png").convert("RGB")
    assert picture.size == (4 * 286 + 6, 24 + 292 + 24)
    legend = {picture.getpixel((14 + 140 * n, 326)) for n in range(len(labels))}
    assert len(legend) == len(labels) and (255, 255, 255) not in legend


def test_voc_without_trainaug_says_what_is_missing(tmp_path, capsys):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").unlink()
    train, *_ = eval_seg.load_dataset("voc", tmp_path)
    assert [mask.parent.name for _, mask, _ in train] == ["SegmentationClass"]
    out = capsys.readouterr().out
    assert all(word in out for word in ("1,464", "SBD", "SegmentationClassAug.zip", "trainaug.txt"))


def test_masks_and_images_stay_in_step_through_random_crops(tmp_path):
    """Pixels hold their coordinates, in image and mask: after any crop they must agree."""
    y, x = np.mgrid[:120, :100]
    write_image(tmp_path / "image.png", np.stack([2 * x, 2 * y, 0 * x], -1))
    lefts, item = set(), (tmp_path / "image.png", tmp_path / "mask.png", {n: n for n in range(256)})
    for axis, pixels in enumerate((y, x), 1):
        write_image(tmp_path / "mask.png", pixels)
        images, masks = eval_seg.read_batch([item], 80, 60, crop=False)
        assert images.shape == (1, 3, 80, 80) and images[0, 2 - axis].max() >= 2 * pixels.max() - 2
        rows = (np.arange(60) + 0.5) * (pixels.max() + 1) / 60  # the nearest of the whole mask
        assert masks[0].unique().tolist() == rows.astype(int).tolist()
        torch.manual_seed(3)
        images, masks = eval_seg.read_batch([item] * 16, 80, 80, crop=True)
        assert (images[:, 2 - axis] / 2 - masks).abs().max() < 1.6
    lefts = [(mask[0, 0].item(), mask[0, -1].item()) for mask in masks.int()]
    assert any(a > b for a, b in lefts) and any(a < b for a, b in lefts)  # flipped and not
    assert len(set(lefts)) > 8 and all(abs(a - b) >= 0.68 * 100 for a, b in lefts)  # all large


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_normalised_images_in_evaluation_mode(tmp_path, precision):
    write_image(tmp_path / "image.png", [[[255, 0, 51]] * 8] * 8)
    write_image(tmp_path / "mask.png", stripes(1))
    items, backbone = [(tmp_path / "image.png", tmp_path / "mask.png", {1: 1})], MeanColour()
    batches = eval_seg.patch_features(backbone.train(), items, 8, 8, "", precision=precision)
    ((features, masks),) = batches
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert features.shape == (1, 3, 2, 2) and features.dtype == torch.float32
    assert features[0, :, 0, 1].tolist() == pytest.approx(expected, rel=0.01)


def test_iou_against_a_slow_count():
    rng = np.random.default_rng(0)
    masks, predictions = rng.integers(0, 4, (2, 3, 20, 20))
    masks[masks == 3] = 255
    predictions[predictions == 3] = 4  # class 4 is predicted and never true; class 3 is neither
    batches = [(torch.tensor(predictions[i:][:2]), torch.tensor(masks[i:][:2])) for i in (0, 2)]
    expected = {}
    for n, name in enumerate("abc"):
        true, predicted = masks == n, (predictions == n) & (masks != 255)
        expected[name] = 100 * (true & predicted).sum() / (true | predicted).sum()
    expected["mIoU"] = sum(expected.values()) / 3
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


@pytest.mark.parametrize("n, chunk", [(30, 64), (64, 64), (77, 8), (5000, 600), (5000, 2**14)])
def test_search_finds_the_neighbours_of_a_full_sort(n, chunk):
    generator = torch.Generator().manual_seed(n)
    memory, queries = (torch.randn(rows, 8, generator=generator) for rows in (n, 70))
    memory[n // 2 :] *= 1.5  # the best lie crowded
    with LargestResult() as largest:
        values, indices = eval_seg.search(queries, memory, 30, chunk)
    order = (queries @ memory.T).sort(descending=True)
    torch.testing.assert_close(values, order.values[:, :30])
    assert torch.equal(indices, order.indices[:, :30])
    assert largest.elements <= max(70 * (chunk + 60), memory.numel())  # never all products


def test_patch_labels_are_frequencies_and_ignored_pixels_do_not_vote():
    mask = torch.tensor([[0, 0, 1, 255], [0, 2, 255, 255], [255, 255, 2, 2], [255, 255, 2, 2]])
    labels = eval_seg.patch_labels(mask[None].byte(), 3, 2)[0]
    expected = [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(labels, torch.tensor(expected))


def test_bounded_memory_keeps_the_rare_class():
    labels = torch.zeros(100, 3)
    labels[:90, 0] = 1
    labels[90:92, 1] = 1  # rare; 92 to 99 have no label
    for seed in range(30):
        uniform = torch.rand(100, generator=torch.Generator().manual_seed(seed))
        chosen = eval_seg.choose_patches(labels, 12, uniform)
        assert len(chosen.unique()) == 12 and {90, 91} <= set(chosen.tolist())
        assert chosen.max() < 92
    assert len(eval_seg.choose_patches(labels, 99, uniform)) == 92
    mixed = torch.tensor([[1.0, 0], [1, 0], [0.5, 0.5], [0, 1]])  # scores u * 3, 3, 5, 2
    chosen = eval_seg.choose_patches(mixed, 2, torch.tensor([0.5, 0.6, 0.28, 0.9]))
    assert sorted(chosen.tolist()) == [0, 2]


def learn(method: str, train: list, size: int, **more):
    """What `learn` returns for MeanColour and two classes, and the layer of its probe."""
    read, layer = partial(eval_seg.patch_features, MeanColour()), torch.nn.Conv2d(3, 2, 1)
    args = dict(dataset="folder", memory=10**6, seed=0, epochs=1) | more
    return eval_seg.learn(method, read, train, size, layer, argparse.Namespace(**args)), layer


def test_memory_is_bounded_and_drawn_by_the_seed(tmp_path):
    write_folder(tmp_path)
    train, *_ = eval_seg.load_dataset("folder", tmp_path)
    found = [learn("in-context", train, 56, memory=30, seed=seed)[0] for seed in (0, 0, 1)]
    one, same, other = (predict.keywords["memory"] for predict in found)
    assert one.shape == (4 * 7, 3) and torch.equal(one, same) and not torch.equal(one, other)


def test_in_context_against_a_plain_loop_over_neighbours(tmp_path):
    """Memory, neighbours, votes and pixels, counted one by one in plain NumPy."""
    rng, side, k = np.random.default_rng(1), 8, 30
    for name in [f"{split}/images/{n}.png" for split in ("train", "val") for n in range(3)]:
        image = rng.integers(0, 256, (16, 16, 3)).repeat(2, 0).repeat(2, 1)
        mask = np.where(image[..., 0] > 128, 1, 0)
        mask[rng.random(mask.shape) < 0.4] = 255
        mask[:8, :16] = 255  # eight patches without a label
        write_image(tmp_path / name, image)
        write_image(tmp_path / name.replace("images", "masks"), mask)
    train, val, _ = eval_seg.load_dataset("folder", tmp_path)

    def read(item):
        image = (np.asarray(Image.open(item[0])) / 255 - neco.MEAN) / neco.STD
        cells = image.reshape(side, 4, side, 4, 3).mean((1, 3)).reshape(-1, 3)
        parts = np.asarray(Image.open(item[1])).reshape(side, 4, side, 4).swapaxes(1, 2)
        return cells / np.linalg.norm(cells, axis=1, keepdims=True), parts.reshape(-1, 16)

    memory, labels, expected = [], [], []
    for item in train:
        for cell, part in zip(*read(item), strict=True):
            part = part[part != 255]
            if len(part):
                memory.append(cell)
                labels.append([(part == 0).mean(), (part == 1).mean()])
    for item in val:
        votes = []
        for cell in read(item)[0]:
            similarity = np.array([cell @ other for other in memory])
            nearest = np.argsort(-similarity)[:k]
            weights = np.exp(similarity[nearest] / 0.02)
            votes.append((weights / weights.sum()) @ np.array(labels)[nearest])
        votes = torch.tensor(np.array(votes)).T.view(1, 2, side, side)
        expected.append(F.interpolate(votes, (32, 32), mode="bilinear")[0].argmax(0))

    predict, _ = learn("in-context", train, 32)
    ((features, _),) = eval_seg.patch_features(MeanColour(), val, 32, 32, "")
    found = torch.stack([*predict(features)])
    assert (found == torch.stack(expected)).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 25])
def test_sgd_probe_against_a_plain_loop(steps):
    generator = torch.Generator().manual_seed(steps)
    features = torch.randn(steps, 2, 3, 4, 4, generator=generator)
    masks = torch.randint(4, (steps, 2, 4, 4), generator=generator)
    masks[masks == 3] = 255
    probe = torch.nn.Conv2d(3, 3, 1)
    weight, bias = probe.weight[:, :, 0, 0].detach().double(), probe.bias.detach().double()
    eval_seg.train_probe(probe, zip(features, masks), steps)
    slow, slow_bias = torch.zeros(3, 3).double(), torch.zeros(3).double()  # the momentum
    for step, (x, y) in enumerate(zip(features.movedim(2, -1).double(), masks)):
        x, y = x[y != 255], y[y != 255]
        error = ((x @ weight.T + bias).softmax(1) - F.one_hot(y, 3)) / len(y)
        slow = 0.9 * slow + error.T @ x + 1e-4 * weight
        slow_bias = 0.9 * slow_bias + error.sum(0) + 1e-4 * bias
        rate = 0.01 if step < 0.8 * steps else 0.001
        weight, bias = weight - rate * slow, bias - rate * slow_bias
    torch.testing.assert_close(probe.weight[:, :, 0, 0].double(), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(probe.bias.double(), bias, rtol=0, atol=1e-6)


def test_solved_probe_leaves_nothing_to_learn():
    """The gradient vanishes at its end, and scale and shift of the features do not matter."""
    generator = torch.Generator().manual_seed(0)
    x, mix = (torch.randn(*shape, generator=generator) for shape in ((20_000, 12), (12, 12)))
    x, scores = x @ mix, []  # correlated, so that it takes many iterations
    labels = (x[:, :3] + 2 * x[:, 3:6]).softmax(1).round(decimals=1)
    for seen in (x, x * torch.logspace(-3, 2, 12) + torch.arange(12)):
        layer = torch.nn.Conv2d(12, 3, 1)
        eval_seg.solve_probe(layer, seen, labels)
        scores.append(layer(seen[:, :, None, None])[:, :, 0, 0].softmax(1))
    gradient = x.T @ (labels.sum(1, keepdim=True) * scores[0] - labels) / len(x)
    assert gradient.abs().max() < 1e-4
    torch.testing.assert_close(*scores, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dataset", ["folder", "voc"])
def test_probe_reads_upsampled_features(tmp_path, dataset):
    write_folder(tmp_path)
    train, *_ = eval_seg.load_dataset("folder", tmp_path)
    predict, layer = learn("linear", train, 56, dataset=dataset)
    features = torch.randn(2, 3, 7, 7)
    scores = layer(F.interpolate(features, (100, 100), mode="bilinear"))
    assert (predict(features) == scores.argmax(1)).float().mean() > 0.999  # but for ties


def test_train_is_learned_from_and_val_is_only_predicted(tmp_path, evaluate, monkeypatch):
    read, original = [], eval_seg.patch_features

    def spy(backbone, items, size, mask_size, label, **more):
        read.append((len(items), items[0][0].parent.name, size, mask_size, more.get("crop", False)))
        return original(backbone, items, size, mask_size, label, **more)

    monkeypatch.setattr(eval_seg, "patch_features", spy)
    write_coco(tmp_path / "data")
    evaluate("--dataset", "coco-stuff", "--epochs", "2")
    in_context = [(20, "train2017", 56, 56, False), (1, "val2017", 56, 56, False)]
    epoch = (2, "train2017", 56, 100, True)  # a tenth of the images, at random
    assert read == [*in_context, epoch, epoch, (1, "val2017", 56, 100, False)]


def test_feature_colours_follow_the_main_directions_of_variance():
    features = torch.zeros(2, 5, 3, 3)
    features[1, 2], features[:, 4, 0] = 9.0, 1.0  # image against image; first row against others
    colours = eval_seg.feature_colours(features).int()
    assert (colours[0, 0] - colours[1, 0]).abs().min() >= 254
    assert (colours[:, 1, 0] - colours[:, 1, 1]).abs().min() >= 254
    assert torch.equal(colours[:, 1, 1], colours[:, 1, 2])


def test_defaults_are_those_of_the_protocols(monkeypatch):
    monkeypatch.setattr(eval_seg, "compare", vars)
    args = eval_seg.main(["--data", "here"])
    assert (args["memory"], args["epochs"]) == (10_240_000, 25)
    assert args["size"] is None and eval_seg.SIZES == {"in-context": 518, "linear": 448}
    assert eval_seg.retrieve.__defaults__ == (30, 0.02) and eval_seg.PROBE_SIZE == 100


def test_results_of_the_first_method_outlive_the_second(tmp_path, evaluate, monkeypatch):
    write_folder(tmp_path / "data")
    monkeypatch.setattr(eval_seg, "solve_probe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert "in-context" in results and "linear" not in results


def test_two_weights_end_to_end(tmp_path, evaluate):
    write_folder(tmp_path / "data")
    weights = str(tmp_path / "other.pth")
    torch.save(neco.load_backbone("tiny").model.state_dict(), weights)
    status, results, out, _ = evaluate("--weights", "none", weights, "--pictures", "2")
    assert status == 0
    table = [re.sub(r"[ (]+", " ", line) for line in out.splitlines()]
    for method in eval_seg.SIZES:
        none, other = (results[method][name]["mIoU"] for name in ("none", weights))
        assert f"mIoU {none:.2f} +0.00) {other:.2f} {other - none:+.2f})" in table
        assert none > 70  # two plain colours
    assert Image.open(tmp_path / "out/picture.png").size == (6 * 286 + 6, 24 + 2 * 286 + 12 + 24)

    command = [sys.executable, eval_seg.__file__, "--data", tmp_path / "data", "--backbone", "tiny"]
    command += ["--weights", weights, "--size", "56", "--workers", "1", "--out", tmp_path]
    subprocess.run(command, check=True)  # alone, the second gets the same figures
    again = json.loads((tmp_path / "results.json").read_text())
    assert all(again[method][weights] == results[method][weights] for method in eval_seg.SIZES)


FOUR, BLANK = [f"masks/{n}.png" for n in range(4)], np.full((56, 56), 255)
REFUSALS = [  # layout, files in place of others (None for none), flags, words of the last line
    ("folder", {}, "--data", "--data"),
    ("folder", {}, "--data gone", "gone/train/images is missing"),
    ("folder", {}, "--dataset voc", "Segmentation/train.txt is missing.*VOCtrainval"),
    ("folder", {}, "--dataset imagenet", "--dataset.*imagenet"),
    ("folder", {"val/masks/0.png": None}, "", "data/val/masks/0.png"),
    ("folder", {f"train/images/{n}.png": None for n in range(4)}, "", "data has no images"),
    ("folder", {"val/masks/1.png": stripes(0, 3)}, "", "val/images/1.png.*differ in size"),
    ("folder", {"val/masks/1.png": GREY}, "", "val/masks/1.png holds .*RGB"),
    (
        "folder",
        {"val/masks/1.png": np.full((56, 56, 4), 1)},
        "",
        "val/masks/1.png holds 65793.*RGB",
    ),
    ("folder", {"val/masks/1.png": np.full((56, 56, 2), 1)}, "", "val/masks/1.png cannot be read"),
    ("folder", {"val/masks/2.png": b"nothing"}, "", "val/masks/2.png cannot be read"),
    ("folder", {"val/images/3.png": b"nothing"}, "", "val/images/3.png cannot be read"),
    ("folder", {"val/images/3.png": b""}, "--workers 1", "error: [^:]*val/images/3.png"),
    ("folder", {f"train/{mask}": BLANK for mask in FOUR}, "", "training masks hold no labelled"),
    ("folder", {f"val/{mask}": BLANK for mask in FOUR}, "", "validation masks hold no labelled"),
    ("folder", {}, "--size 57", "--size 57.*14"),
    ("folder", {}, "--weights none gone.pth", "--weights gone.pth"),
    ("folder", {}, "--weights {root}/nan.pth", "--weights.*not finite"),
    ("folder", {}, "--backbone resnet", "--backbone resnet"),
    ("folder", {"file": b""}, "--out {root}/file", "data/file"),
    ("voc", {"SegmentationClass/c.png": stripes(0, 33)}, "", "SegmentationClass/c.png holds 33"),
    ("voc", {"JPEGImages/c.jpg": None}, "", "JPEGImages/c.jpg is missing.*VOCtrainval"),
    ("voc", {"SegmentationClass/c.png": None}, "", "Class/c.png is missing.*VOCtrainval"),
    ("ade20k", {"objectInfo150.txt": None}, "", "objectInfo150.txt is missing.*ADEChallengeData"),
    ("coco-things", {"val2017/val20170.jpg": None}, "", "val20170.jpg is missing.*val2017.zip"),
    ("coco-things", {"annotations/panoptic_val2017.json": None}, "", "missing.*panoptic_annot"),
    ("coco-stuff", {"annotations/stuff_val2017.json": None}, "", "missing.*stuff_annotations"),
]


@pytest.mark.parametrize("layout, files, flags, words", REFUSALS, ids=[row[3] for row in REFUSALS])
def test_bad_input_is_one_sentence_and_status_2(tmp_path, evaluate, layout, files, flags, words):
    root = tmp_path / "data"
    LAYOUTS[layout][0](root)
    for path, content in files.items():
        (root / path).unlink() if content is None else write_image(root / path, content)
    state = {name: value * math.nan for name, value in neco.TinyViT().state_dict().items()}
    torch.save(state, root / "nan.pth")
    status, results, _, err = evaluate("--dataset", layout, *flags.format(root=root).split())
    last = err.strip().splitlines()[-1]
    assert status == 2 and not results
    assert last.startswith("eval_seg.py: error: ") and re.search(words, last), last
