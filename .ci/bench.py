# SPDX-License-Identifier: MIT
"""Benchmark of neco.py beside the public implementations of its parts. For development only.

    pip install diffsort==0.2.0
    git clone https://github.com/vpariza/NeCo public
    git clone https://github.com/facebookresearch/dinov2

    python .ci/bench.py                                   # all sections, small enough for a CPU
    python .ci/bench.py loss --threads 2
    python .ci/bench.py views --images coco/val2017 --neco-checkout public
    python .ci/bench.py step --hub dinov2 --backbone dinov2_vits14_reg --batch-size 2   # on a CPU
    python .ci/bench.py step --hub dinov2 --compile       # on a GPU: ViT-S/14, 64 images a step
    python .ci/bench.py step --hub dinov2 --sizes         # memory of ViT-S, B and L
    python .ci/bench.py growth --files 1000000

Implementations take turns in one process: median (smallest - largest), ratios within a turn.
Peak memory is that of a process of its own. Prints one markdown table a question.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from diffsort import DiffSortNet
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import neco  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEPS = 46_200  # of the recipe, of 64 images each
WORKERS = min(16, os.cpu_count() or 1)
KINDS = {"global": slice(0, 2), "local": slice(2, 6)}  # which of the six crops

# ---------------------------------------------------------------------------------- measuring


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def take_turns(calls: dict, repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds of each call, in turns, after one call of each that does not count."""
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * np.array(values[1:]) for name, values in seconds.items()}


def spread(values: np.ndarray) -> str:
    return f"{np.median(values):.4g} ({values.min():.4g} - {values.max():.4g})"


def table(title: str, *rows: list) -> None:
    """Print a markdown table; the first row is its header."""
    print(f"\n**{title}**\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows[1:]:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    sys.stdout.flush()


def kilobytes(file: str, field: str) -> int:
    """A field of a file such as /proc/self/status."""
    lines = Path("/proc", file).read_text().splitlines()
    return int(next(s for s in lines if s.startswith(field)).split()[1])


def peak_of(call, cuda: bool = CUDA) -> dict[str, float]:
    """Peak memory in MB of two calls: `total`, and `added` to what was there before."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:  # not ru_maxrss, which starts at the peak of the parent process
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("self/status", "VmRSS") / 1e3
    call()
    call()
    hwm = kilobytes("self/status", "VmHWM") / 1e3
    total = torch.cuda.max_memory_allocated() / 1e6 if cuda else hwm
    return {"total": total, "added": total - before}


def in_own_process(task: str, **settings) -> dict[str, float]:
    """Run `measure(task, settings)` in a fresh process; NaN where that fails."""
    settings["threads"] = torch.get_num_threads()
    command = [sys.executable, __file__, "--measure", task, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{task} {settings} failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    return {"total": math.nan, "added": math.nan}


def measure(task: str, settings: dict) -> dict[str, float]:
    torch.set_num_threads(settings.pop("threads"))
    if task == "listing":
        return listing(**settings)
    prepare = {"sort": sort_call, "loss": loss_call, "step": step_call}[task]
    if not CUDA:  # what is loaded or built once does not count
        prepare(**settings | {"batch": 1})()
    return peak_of(prepare(**settings))


# --------------------------------------------------------------------------------------- loss


def diffsort_loss(sorter, student, teacher, references) -> torch.Tensor:
    """The loss of neco_loss on diffsort, whose permutations are [item, rank]."""
    p = sorter(neco.cosine_similarities(student, references).flatten(0, 1))[1]
    with torch.no_grad():
        q = sorter(neco.cosine_similarities(teacher, references).flatten(0, 1))[1]
    return -(q * p.log()).sum(-1).mean()


def loss_call(way: str, batch: int = 64, references: int = 49, pairs: int = 1):
    """Prepare forward and backward of the loss; the call returns the loss and its gradient."""
    torch.manual_seed(0)
    student = torch.randn(pairs * batch, 49, 256, device=DEVICE, requires_grad=True)
    teacher = student.detach() + 0.5 * torch.randn_like(student)
    drawn = torch.randn(pairs * batch, references, 256, device=DEVICE)
    sorter = DiffSortNet("bitonic", references, str(DEVICE), steepness=100)
    function = torch.compile(neco.neco_loss) if way == "compiled" else neco.neco_loss

    def call():
        student.grad = None
        if way == "diffsort":  # one crop pair after the other, as the public code
            parts = zip(*(x.chunk(pairs) for x in (student, teacher, drawn)))
            loss = sum(diffsort_loss(sorter, *part) for part in parts) / pairs
        else:
            loss = function(student, teacher, drawn)
        loss.backward()
        return loss.item(), student.grad

    return call


def sort_call(way: str, batch: int = 64):
    """Prepare forward and backward of a sorting network alone."""
    torch.manual_seed(0)
    x = torch.randn(batch * 49, 49, device=DEVICE).div(16).requires_grad_()
    weight = torch.rand(batch * 49, 49, 49, device=DEVICE)
    sorter = DiffSortNet("bitonic", 49, str(DEVICE), steepness=100)
    sort = sorter if way == "diffsort" else neco.soft_sort
    return lambda: torch.autograd.grad((sort(x)[1] * weight).sum(), x)


def bench_loss(args: argparse.Namespace) -> None:
    (mine, gradient), (theirs, other) = loss_call("ours")(), loss_call("diffsort")()
    off = (gradient - other).abs().max() / other.abs().max()
    print(f"\nloss {mine:.6f}, on diffsort {theirs:.6f}; gradients: {off:.1e} of the largest apart")
    cases = [("soft_sort", "ours", "sort", {}), ("neco_loss", "ours", "loss", {})]
    cases += [("neco_loss, ten pairs", "ours", "loss", {"pairs": 10})] * CUDA
    if args.compile:
        settings = {"pairs": 10} if CUDA else {}
        cases.append(("neco_loss, compiled" + ", ten pairs" * CUDA, "compiled", "loss", settings))
    rows = [["forward and backward", "ms", "ms diffsort", "ratio", "MB", "MB diffsort", "ratio"]]
    for name, way, task, settings in cases:
        prepare = {"sort": sort_call, "loss": loss_call}[task]
        try:
            calls = {w: prepare(w, **settings) for w in (way, "diffsort")}
            ours, dense = take_turns(calls, args.repeats).values()
        except Exception as error:  # what does not compile or fit must not end the benchmark
            print(f"{name} does not run: {str(error).splitlines()[:1]}")
            continue
        a, b = (in_own_process(task, way=w, **settings)["added"] for w in calls)
        row = [name, spread(ours), spread(dense), f"{np.median(dense / ours):.1f}"]
        rows.append([*row, f"{a:.0f}", f"{b:.0f}", f"{b / a:.1f}"])
    table(f"Ranking loss, 3136 x 49 similarities a pair, {args.threads} threads", *rows)


# -------------------------------------------------------------------------------------- views


def write_images(source: str | None, folder: str, count: int = 24) -> list[str]:
    """Write 640 x 480 JPEGs: of the images in `source`, or of noise as smooth as photographs."""
    found = list(map(os.fsdecode, neco.find_images(source))) if source else []
    rng = np.random.default_rng(0)
    paths = [os.path.join(folder, f"{i}.jpg") for i in range(count)]
    for i, path in enumerate(paths):
        pixels = np.full((480, 640, 3), 128.0)
        for octave in range(1, 8):
            noise = rng.integers(0, 256, (3 * 2**octave, 4 * 2**octave, 3), dtype=np.uint8)
            noise = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
            pixels += (np.asarray(noise, dtype=float) - 128) * 0.8**octave
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if found:
            image = neco.load_image(os.path.join(source, found[i * len(found) // count]))
        image.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=92)
    return paths


def public_transforms(checkout: str):
    """The transforms of the public code with the settings of its recipe, and their module."""
    path = Path(checkout, "src", "neco_transforms.py")
    spec = importlib.util.spec_from_file_location("neco_transforms", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    crops = [518, 98], [2, 4], [0.25, 0.05], [1.0, 0.25]
    return module.NeCoTransforms(*crops, jitter_strength=1.0, min_intersection=0.01), module


def compare(kind: str, name: str, draws: int, ours: np.ndarray, public: np.ndarray) -> list:
    """Moments of two samples and their Kolmogorov-Smirnov distance, with the limit at 5 %.

    The limit counts the draws, not the crops: those of one draw overlap, and so are related.
    """
    at = np.sort(np.concatenate([ours, public]))
    shares = [np.searchsorted(np.sort(v), at, "right") / len(v) for v in (ours, public)]
    distance, limit = np.abs(shares[0] - shares[1]).max(), 1.36 * math.sqrt(2 / draws)
    moments = [f"{v.mean():.4f}, {v.std():.4f}" for v in (ours, public)]
    return [kind, name, *moments, f"{distance:.4f}", f"{limit:.4f}"]


def box_shapes(boxes: np.ndarray) -> dict[str, np.ndarray]:
    left, top, right, bottom = boxes.reshape(-1, 4).T
    w, h = right - left, bottom - top
    logs = {"area share": w * h / (640 * 480), "log aspect ratio": np.log(w / h)}
    return logs | {"centre x": (left + right) / 1280, "centre y": (top + bottom) / 960}


def pixel_shapes(crops: list[torch.Tensor]) -> dict[str, np.ndarray]:
    shape = {f"mean of {name}": [x[c].mean() for x in crops] for c, name in enumerate("RGB")}
    shape |= {f"std of {name}": [x[c].std() for x in crops] for c, name in enumerate("RGB")}
    return {name: np.array(values) for name, values in shape.items()}


def compare_views(checkout: str, path: str, boxes: int = 2000, crops: int = 100) -> list[list]:
    """Distributions of crop boxes and of the pixels of final crops, of one image."""
    rows = [["crops", "", "ours: mean, std", "public: mean, std", "distance", "limit"]]
    image, rng, public = neco.load_image(path), random.Random(0), []
    transforms, module = public_transforms(checkout)
    transforms.color_transform = transforms.final_transform = lambda image: image
    module.F = types.SimpleNamespace(
        resized_crop=lambda _, top, left, h, w, *rest: public.append((left, top, left + w, top + h))
    )
    for _ in range(boxes):
        transforms(image)
    ours = [neco.random_boxes(640, 480, 4, rng) for _ in range(boxes)]
    ours, public = (np.array(way, dtype=float).reshape(-1, 6, 4) for way in (ours, public))
    for kind, part in KINDS.items():
        ways = [box_shapes(way[:, part]) for way in (ours, public)]
        rows += [compare(kind, name, boxes, *(way[name] for way in ways)) for name in ways[0]]
    ours, (transforms, _) = [], public_transforms(checkout)
    for _ in range(crops):
        made = neco.make_views(image, 518, 98, 4, rng)
        views = [*made["global_crops"].split(1), *made["local_crops"].split(1)]
        changed = zip(views, made["colours"].split(1))
        ours.append([neco.change_colours(view, colours)[0] for view, colours in changed])
    public = [transforms(image)[0] for _ in range(crops)]
    for kind, part in KINDS.items():
        ways = [[crop for views in way for crop in views[part]] for way in (ours, public)]
        bins = torch.linspace(-2.2, 2.7, 33)
        shares = [torch.stack([c.flatten()[::3] for c in way]).flatten() for way in ways]
        shares = [torch.histogram(v, bins)[0] / len(v) for v in shares]
        off = float((shares[0] - shares[1]).abs().sum() / 2)
        ways = [pixel_shapes(way) for way in ways]
        rows += [compare(kind, name, crops, *(way[name] for way in ways)) for name in ways[0]]
        rows.append([kind, "all pixels in 32 bins", "", "", f"{off:.4f}", ""])
    return rows


def loader_rate(folder: str) -> float:
    """Images a second of the training's loader: all workers, with collation and transfer."""
    args = neco.parse_arguments(["--data", folder])
    dataset = neco.CropDataset(args, neco.find_images(folder), 16)
    batches, kept = [range(16)] * (12 + 3 * WORKERS), {"pin_memory": CUDA, "num_workers": WORKERS}
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=neco.collate, **kept))
    for _ in range(3 * WORKERS):  # those made while the workers started
        next(loader)
    start = time.perf_counter()
    return 16 * sum(1 for _ in loader) / (time.perf_counter() - start)


def bench_views(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths, rng, made = write_images(args.images, folder), random.Random(0), []

        def ours() -> None:
            made[:] = [neco.make_views(neco.load_image(p), 518, 98, 4, rng) for p in paths]

        calls = {"load_image": lambda: [neco.load_image(p) for p in paths]}
        calls["load_image + make_views"] = ours
        if args.neco_checkout:
            public, _ = public_transforms(args.neco_checkout)
            calls["public"] = lambda: [public(Image.open(p).convert("RGB")) for p in paths]
        torch.set_num_threads(1)
        times = take_turns(calls, args.repeats)
        torch.set_num_threads(args.threads)
        views = {key: torch.stack([v[key] for v in made]) for key in made[0]}
        colours = views["colours"].split([2, 4], dim=1)
        sizes = zip((views["global_crops"], views["local_crops"]), colours)
        parts = [(v.flatten(0, 1).to(DEVICE), c.flatten(0, 1)) for v, c in sizes]
        change = {"change_colours, on the device": lambda: [neco.change_colours(*p) for p in parts]}
        times |= take_turns(change, args.repeats)
        rows = [["six crops", "ms an image", "images/s", "times public"]]
        for name, values in times.items():
            row = [name, spread(values / len(paths)), f"{1e3 * len(paths) / np.median(values):.1f}"]
            faster = "public" in times and "views" in name
            rows.append([*row, f"{np.median(times['public'] / values):.2f}" if faster else ""])
        rows.append([f"loader, {WORKERS} workers", "", f"{loader_rate(folder):.1f}", ""])
        table("Views from 640 x 480 JPEGs, on one core", *rows)
        if args.neco_checkout:
            table("Distribution of the views", *compare_views(args.neco_checkout, paths[0]))


# --------------------------------------------------------------------------------------- step


def make_trainer(flags: list[str]) -> neco.Trainer:
    args = neco.parse_arguments(["--data", ".", "--steps", str(STEPS), *flags])
    if args.backbone == "tiny" or args.weights:
        return neco.Trainer(neco.load_backbone(args.backbone, args.hub, args.weights), args, DEVICE)
    model = neco.load_hub_model(args.backbone, args.hub, pretrained=False)  # costs the same
    return neco.Trainer(neco.Backbone(model).train(), args, DEVICE)


def paper_step(trainer: neco.Trainer, optimizer, sorter, views: list, boxes) -> None:
    """A step in the way of the public code: float32, dense sorting layers, pair after pair."""
    grid, size, student = trainer.args.grid, len(boxes), trainer.student
    with torch.no_grad():
        targets = trainer.teacher([torch.cat(views[:2])])[0].chunk(2)
        new = torch.stack(targets).flatten(3).mT[:, :, :10].flatten(1, 2)
        trainer.queue = neco.push(trainer.queue, new, trainer.args.queue)
    noise = torch.rand(trainer.noise_rows, 6 * size, device=DEVICE).split([2 * size, 4 * size], 1)
    maps = student([torch.cat(views[:2]), torch.cat(views[2:])], noise)
    maps = [m for same_size in maps for m in same_size.split(size)]
    losses = []
    for g, v in trainer.pairs:
        shared = neco.intersect(boxes[:, g], boxes[:, v])
        cells = neco.align(maps[v], boxes[:, v], shared, grid)
        target = neco.align(targets[g], boxes[:, g], shared, grid)
        scores = torch.rand(size, trainer.queue.shape[1], device=DEVICE)
        drawn = trainer.queue[g][scores.topk(grid**2).indices]
        losses.append(diffsort_loss(sorter, cells, target, drawn))
    optimizer.zero_grad()
    (sum(losses) / len(losses)).backward()
    optimizer.step()
    with torch.no_grad():
        for mine, other in zip(trainer.teacher.parameters(), student.parameters()):
            mine.mul_(0.9995).add_(other, alpha=1 - 0.9995)


def step_call(way: str, flags: list[str], batch: int):
    """Prepare a training step, ours or as the public code does it, on the same crops."""
    extra = {"paper": ["--precision", "fp32"], "compiled": ["--compile"]}.get(way, [])
    trainer = make_trainer([*flags, "--batch-size", str(batch), *extra])
    args, rng = trainer.args, random.Random(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
    sizes = args.global_size, args.local_size, args.local_crops
    crops = [neco.make_views(image, *sizes, rng) | {"unreadable": []} for _ in range(batch)]
    crops = {k: v.pin_memory() if CUDA and len(v) else v for k, v in neco.collate(crops).items()}
    if way != "paper":
        return lambda: trainer.train_step(crops, False)
    groups = neco.parameter_groups(trainer.student, args.lr, args.head_lr)
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    trainer.queue = torch.randn(2, args.queue, 256, device=DEVICE)
    sorter = DiffSortNet("bitonic", args.grid**2, str(DEVICE), steepness=100)
    views = [*crops["global_crops"].unbind(1), *crops["local_crops"].unbind(1)]
    colours = crops["colours"].unbind(1)  # changed by the public loader: no part of the step
    views = [neco.change_colours(v.to(DEVICE), c) for v, c in zip(views, colours)]
    boxes = crops["boxes"].to(DEVICE)
    return lambda: paper_step(trainer, optimizer, sorter, views, boxes)


def profile(call) -> list[list]:
    """The ten operations that take most of a call, by the time of their own."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * CUDA) as profiler:
        call()
        synchronize()
    own = {
        e: e.self_device_time_total if CUDA else e.self_cpu_time_total
        for e in profiler.key_averages()
        if not CUDA or e.device_type == torch.autograd.DeviceType.CUDA  # kernels, not their callers
    }
    rows = [["operation", "share", "ms", "calls"]]
    for event in sorted(own, key=own.get, reverse=True)[:10]:
        share = f"{own[event] / sum(own.values()):.1%}"
        rows.append([f"`{event.key[:70]}`", share, f"{own[event] / 1e3:.2f}", event.count])
    return rows


def bench_step(args: argparse.Namespace) -> None:
    name = args.backbone or ("dinov2_vits14_reg" if CUDA else "tiny")
    batch = args.batch_size or (64 if CUDA else 8)
    flags = ["--backbone", name]
    flags += ["--global-size", "98", "--local-size", "42"] * (name == "tiny")
    flags += ["--hub", args.hub] * bool(args.hub) + ["--weights", args.weights] * bool(args.weights)
    ways = {"ours": "ours"} | ({"compiled": "ours"} if args.compile else {}) | {"paper": "diffsort"}
    calls = {way: step_call(way, flags, batch) for way in ways}
    times = take_turns(calls, args.repeats)
    losses = {kind: loss_call(kind, batch, pairs=10) for kind in ("ours", "diffsort")}
    losses = take_turns(losses, args.repeats)
    rows = [["", "ms", "images/s", "times the paper's", "peak MB", "of which loss"]]
    for way, kind in ways.items():
        step, peak = times[way], in_own_process("step", way=way, flags=flags, batch=batch)
        row = [way, spread(step), f"{1e3 * batch / np.median(step):.1f}"]
        row.append(f"{np.median(times['paper'] / step):.2f}")
        row.append(f"{peak['total' if CUDA else 'added']:.0f}")
        rows.append([*row, f"{np.median(losses[kind]) / np.median(step):.1%}"])
    table(f"A step: {name}, {batch} images; peak {'in all' if CUDA else 'added'}", *rows)
    table("Where the time of our step goes", *profile(calls["ours"]))
    fastest = 1e3 * batch / min(np.median(times[way]) for way in list(ways)[:-1])
    with tempfile.TemporaryDirectory() as folder:
        write_images(args.images, folder)
        loader = loader_rate(folder)
    hours = STEPS * 64 / min(fastest, loader) / 3600
    print(f"\nDevice {fastest:.1f} images/s; loader of {WORKERS} workers, full size: {loader:.1f};")
    print(f"by the slower one, {STEPS} steps of 64 images take {hours:.2f} hours.")
    if not (args.sizes and CUDA):
        return
    del calls
    torch.cuda.empty_cache()
    rows = [["", "GB of 16 images", "of 32", *(f"images in {gb} GB" for gb in (24, 80, 140))]]
    for flags[1] in ("dinov2_vits14_reg", "dinov2_vitb14_reg", "dinov2_vitl14_reg"):
        step = {"way": "ours", "flags": flags}
        few, more = (in_own_process("step", **step, batch=b)["total"] / 1e3 for b in (16, 32))
        if not math.isnan(more - few):
            fits = [int(16 + (gb - 1.5 - few) * 16 / (more - few)) for gb in (24, 80, 140)]
            rows.append([flags[1], f"{few:.1f}", f"{more:.1f}", *fits])
    table("Peak memory; largest batch on a straight line, 1.5 GB left to the driver", *rows)


# ------------------------------------------------------------------------------------- growth


def listing(folder: str) -> dict[str, float]:
    """Seconds and MB of listing a folder, and of 16 loader workers that read from it."""
    start, files = time.perf_counter(), []
    peak = peak_of(lambda: files or files.append(neco.find_images(folder)), cuda=False)
    listed = time.perf_counter() - start
    args = neco.parse_arguments(["--data", folder, "--global-size", "98", "--local-size", "42"])
    dataset = neco.CropDataset(args, files[0], len(files[0]))
    batches = [range(start, start + 8) for start in range(0, 512, 8)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=16, collate_fn=neco.collate)
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    pss = [kilobytes(f"{worker.pid}/smaps_rollup", "Pss:") for worker in batches._workers]
    seconds = {"listed": listed, "ready": time.perf_counter() - start}
    sizes = {"array": files[0].nbytes / 1e6, "workers": sum(pss) / 1e3}
    return peak | seconds | sizes | {"main": kilobytes("self/smaps_rollup", "Pss:") / 1e3}


def write_links(folder: str, count: int) -> None:
    """Fill a folder with `count` names of small JPEGs, a thousand in each folder below."""
    for start in range(0, count, 1000):
        place = Path(folder, f"{start // 1000:05}")
        place.mkdir()
        Image.new("RGB", (64, 48)).save(place / f"{start:012}.jpg")
        for i in range(start + 1, min(start + 1000, count)):
            os.link(place / f"{start:012}.jpg", place / f"{i:012}.jpg")


def bench_growth(args: argparse.Namespace) -> None:
    rows = [["rows", "references", "ms", "MB", "ns of an entry of P"]]
    cases = [(4, r) for r in (16, 25, 49, 100, 196, 256)] + [(b, 49) for b in (8, 16, 32, 64)]
    for batch, references in cases:
        times = take_turns({"": loss_call("ours", batch, references)}, args.repeats)[""]
        peak = in_own_process("loss", way="ours", batch=batch, references=references)["added"]
        entry = np.median(times) * 1e6 / (49 * batch * references**2)
        rows.append([49 * batch, references, spread(times), f"{peak:.0f}", f"{entry:.1f}"])
    table("Growth of neco_loss", *rows)
    rows = [["global, local size", "grid", "ms", "MB added"]]
    cases = [(size, 42, 7) for size in (98, 196, 392)] + [(196, 98, 7), (196, 196, 7)]
    for size, local, grid in cases + [(196, 42, grid) for grid in (4, 10, 14)]:
        flags = f"--backbone tiny --hidden 256 --global-size {size} --local-size {local}".split()
        step = {"flags": [*flags, "--grid", str(grid)], "batch": 4, "way": "ours"}
        times = take_turns({"": step_call(**step)}, args.repeats)[""]
        peak = in_own_process("step", **step)["added"]
        rows.append([f"{size}, {local}", grid, spread(times), f"{peak:.0f}"])
    table("Growth of a step of 4 images, tiny", *rows)
    rows = [["files", "s to list", "MB peak", "MB list", "s to 8 batches", "MB main", "MB workers"]]
    for count in (1000, args.files):
        with tempfile.TemporaryDirectory() as folder:
            write_links(folder, count)
            r = in_own_process("listing", folder=folder)
        keys = ("listed", "added", "array", "ready", "main", "workers")
        rows.append([count, *(f"{r.get(key, math.nan):.1f}" for key in keys)])
    table("Growth with files; MB of the main process and of 16 workers: their PSS", *rows)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]))))
        return
    benches = (bench_loss, bench_views, bench_step, bench_growth)
    sections = {bench.__name__.removeprefix("bench_"): bench for bench in benches}
    parser = argparse.ArgumentParser("bench.py", description="Benchmark of neco.py.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(sections)}; default: all")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--images", help="folder of photographs for the views; default: noise")
    parser.add_argument("--neco-checkout", help="checkout of vpariza/NeCo, for its transforms")
    parser.add_argument("--backbone", help="as in neco.py, for step")
    parser.add_argument("--hub", help="as in neco.py; random weights unless --weights")
    parser.add_argument("--weights", help="as in neco.py")
    parser.add_argument("--batch-size", type=int, help="images a step; default 64, on a CPU 8")
    parser.add_argument("--compile", action="store_true", help="also compiled, in loss and step")
    parser.add_argument("--sizes", action="store_true", help="memory of ViT-S, B, L; on a GPU")
    parser.add_argument("--files", type=int, default=100_000, help="to list, in growth")
    args = parser.parse_args()
    for name in set(args.sections) - set(sections):
        parser.error(f"there is no section {name}: choose of {', '.join(sections)}")
    torch.set_num_threads(args.threads)
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    device = torch.cuda.get_device_name() if CUDA else "no GPU"
    versions = f"torch {torch.__version__}, {args.threads} threads, {datetime.date.today()}"
    print(f"{device}, {os.cpu_count()} cores ({cpu[0] if cpu else 'unknown'}), {versions}")
    for name in args.sections or sections:
        sections[name](args)


if __name__ == "__main__":
    main()
