"""Classify videos one by one, and draw what happened to each frame.

    python examples/predict.py runs/mine/model VIDEO...
    python examples/predict.py runs/mine/model DIR --compare

A DIR with video files in it stands for all of them. With --compare, every frame also runs through the network without
gates, and the last lines say what the gates saved and how many answers stayed.

MODEL is a folder that `save_pretrained` or a training recipe wrote. A bad file is reported and stops no other. MACs are
multiply-adds, the literature's "FLOPs".
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dynskip import UNSEEN, DynskipError, SkipOutput, StopOrForward, plot, video
from dynskip.activation import named_classes
from dynskip.video import command
from dynskip.video.outputs import check_folders


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("model", metavar="MODEL", help="folder of a saved model, or its name on the Hugging Face Hub")
    add("videos", type=Path, nargs="+", metavar="VIDEO", help="video files, folders of them or of frames, or pictures")
    add("--out", type=Path, default=Path("runs/predict"), help="folder for the pictures (default: runs/predict)")
    add("--compare", action="store_true", help="also run without gates; say what is saved and which answers stay")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    return top


def describe(name: str, output: SkipOutput, model: StopOrForward, size: int) -> str:
    """Say in words what happened to one video."""
    names = model.class_names or [f"class {n}" for n in range(model.backbone.num_classes)]
    answer = named_classes(output.probabilities[0], output.activation)
    said = ", ".join(f"{names[n]} {100 * probability:.1f} %" for n, probability in answer.items()) or "no class"
    stopped_at, stages = output.stopped_at[0], model.backbone.num_stages
    where = [f"{int((stopped_at == n).sum())} at {name}" for n, name in enumerate(model.backbone.stage_names)]
    stopped = ", ".join(text for text in where if not text.startswith("0 "))
    used, unseen = int((stopped_at == stages).sum()), int((stopped_at == UNSEEN).sum())
    dense = len(stopped_at) * model.lookup_for((size, size)).dense / 1e9
    frames = (
        f"{used} used, {len(stopped_at) - used - unseen} stopped{f' ({stopped})' if stopped else ''}, {unseen} unseen"
    )
    text = (
        f"{name}: {said}\n  frames: {frames}\n"
        f"  {float(output.macs[0]) / 1e9:.3g} GMACs (multiply-adds) against {dense:.3g} dense"
    )
    if output.fallback[0]:
        text += f"\n  no frame passed every gate: frame {int(output.fallback_frame[0])} was run to the end instead"
    return text


class Cost(NamedTuple):
    """What the network took for a video, with gates or without."""

    answer: tuple[int, ...]
    macs: float
    milliseconds: float


def measured(model: StopOrForward, clip: video.LazyClips, dense: bool = False) -> tuple[SkipOutput, Cost]:
    """Run one video; its milliseconds are the network's, waiting for frames is left out."""
    begin = time.perf_counter()
    output = model(clip, dense=dense)
    macs = float(output.macs[0])  # waits for a GPU
    milliseconds = 1000 * (time.perf_counter() - begin - clip.waited)
    return output, Cost(tuple(named_classes(output.probabilities[0], output.activation)), macs, milliseconds)


def savings(gated: Sequence[Cost], dense: Sequence[Cost]) -> str:
    """Say what gates saved over all videos, and how many answers stayed."""
    macs, dense_macs = (sum(cost.macs for cost in costs) / len(costs) / 1e9 for costs in (gated, dense))
    taken, dense_taken = (sum(cost.milliseconds for cost in costs) / len(costs) for costs in (gated, dense))
    kept = sum(one.answer == other.answer for one, other in zip(gated, dense, strict=True))
    return (
        f"Saved: {1 - macs / dense_macs:.1%} of the multiply-adds "
        f"({macs:.3g} GMACs a video instead of {dense_macs:.3g})\n"
        f"  and {1 - taken / dense_taken:.1%} of the network's time ({taken:.1f} ms instead of {dense_taken:.1f}).\n"
        f"  {kept} of {len(gated)} answers are those of the network without gates."
    )


def predict(model: StopOrForward, clip: video.LazyClips, path: Path, picture: Path) -> Cost:
    """Classify one video; print and draw what happened."""
    stages = model.backbone.stage_names
    output, cost = measured(model, clip)
    fallback, loaded = int(output.fallback_frame[0]), clip.loaded()[0]
    text = describe(path.name, output, model, clip.prep.size)
    text += (
        f"\n  {loaded.frames} frames, {loaded.decoded} decoded for them: {loaded.milliseconds:.1f} ms; "
        f"network {cost.milliseconds:.1f} ms"
    )
    text += "".join(f"\n  {note}" for note in video.notes_on(clip.sources[0]))
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    line = plot.timeline_text(output.stopped_at[0], stages, fallback_frame=fallback, color=color)
    print(f"{text}\n{textwrap.indent(line, '  ')}")
    figure = plot.timeline(
        clip.pictures(0), output.stopped_at[0], stages, fallback_frame=fallback, title=text.splitlines()[0]
    )
    figure.savefig(picture)
    print(f"  {picture}")
    return cost


def opened(paths: Sequence[Path], prep: video.Preprocessing, device: str) -> Iterator[video.LazyClips | DynskipError]:
    """Open videos, each while the network still works on the one before; give an error for one that cannot be."""

    def start(path: Path) -> video.LazyClips | DynskipError:
        try:
            clip = video.LazyClips([video.open_source(path)], prep, device)
        except (video.VideoError, video.MachineError) as error:
            return error
        clip.expect(torch.arange(prep.num_frames)[None])
        return clip

    clips = [start(path) for path in paths[:1]]
    for path in [*paths[1:], None]:
        clips += [start(path)] if path is not None else []
        yield clips.pop(0)


def predict_all(args: argparse.Namespace) -> int:
    """Classify all videos; return 1 if some could not be read, 2 if none could."""
    check_folders(args.out)
    paths: list[Path] = []
    for path in args.videos:  # a folder of video files, or else a video
        paths += (video.find_videos(path)[0] if path.is_dir() else []) or [path]
    failed, stems = 0, [path.stem for path in paths]
    gated: list[Cost] = []
    dense: list[Cost] = []
    model = StopOrForward.from_pretrained(args.model).to(args.device)
    clips = opened(paths, video.Preprocessing.of(model), args.device)
    for number, (path, clip) in enumerate(zip(paths, clips, strict=True), start=1):
        twin = f"_{number}" if stems.count(path.stem) > 1 else ""
        try:
            if isinstance(clip, DynskipError):
                raise clip
            with clip:
                if args.compare and not dense:  # first calls allocate and choose kernels: not timed
                    measured(model, clip), measured(model, clip, dense=True)
                cost = predict(model, clip, path, args.out / f"{path.stem}{twin}.png")
                if args.compare:
                    dense.append(measured(model, clip, dense=True)[1])
                    gated.append(cost)
        except (video.VideoError, video.MachineError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    if dense:
        print(savings(gated, dense))
    if failed:
        print(f"{failed} of {len(paths)} files could not be read.", file=sys.stderr)
    return 2 if failed == len(paths) else min(failed, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)
    return command.run(lambda: predict_all(args), "What was printed and drawn stays.", "Close other programs.")


if __name__ == "__main__":
    sys.exit(main())
