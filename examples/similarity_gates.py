"""Gates that need no training, around a finished classifier: stop frames that are much like the last used one.

    python examples/similarity_gates.py --backbone resnet50 --weights FILE --videos DIR --out runs/similar

How much alike is chosen on the videos of DIR, which need no labels: as much as leaves the network's answers unchanged.
It writes a folder that predict.py, stream_video.py, corpus_ray.py and evaluate.py take. docs/gates.md has other gates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dynskip import DynskipError, StopOrForward, calibrate, video
from dynskip.video import command
from dynskip.video.annotations import text_lines
from dynskip.video.outputs import check_folders
from dynskip.video.similar import similarity_model


@torch.no_grad()
def choose_threshold(model: StopOrForward, folder: Path, max_loss: float) -> None:
    """Choose the cheapest threshold with which at most `max_loss` percent of a folder's videos change their answer."""
    encoded, prep = [], video.Preprocessing.of(model)
    for path in tqdm(video.find_videos(folder)[0], "encode", leave=False, disable=None):
        try:
            with video.LazyClips([video.open_source(path)], prep) as clip:
                features = model.encode(clip.whole(None, "cpu"))
        except video.VideoError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        encoded.append((features, features.frame_logits.mean(1).argmax(-1)))
    if not encoded:
        raise DynskipError(f"{folder} has no video that can be read. Give a folder of video files.")
    found = calibrate.to_accuracy(model, encoded, max_loss / 100, per_gate=False)
    found.apply(model)
    print(
        f"Chosen on {len(encoded)} videos: {found.point.macs / 1e9:.4g} GMACs (multiply-adds) a video instead of "
        f"{found.dense.macs / 1e9:.4g}.\n  {100 * found.point.accuracy:.4g} % of the answers are those of the network."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="resnet50", help="any timm model (default: resnet50)")
    add("--weights", default="hub", help="of the backbone: 'hub' downloads timm's (default), or a FILE")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--distance", type=float, default=0.003, help="stop frames this close to the last used one (0.003)"
    )
    how.add_argument("--videos", type=Path, metavar="DIR", help="or choose that on the videos of a folder")
    add("--max-loss", type=float, default=2.0, metavar="PERCENT", help="of their answers that may change (default: 2)")
    add("--size", type=int, default=168, help="height and width of the frames in pixels (default: 168)")
    add("--frames", type=int, default=16, help="frames of a video (default: 16)")
    add("--class-names", type=Path, metavar="FILE", help="the network's classes, a name a line (default: ImageNet's)")
    add("--out", type=Path, required=True, help="new folder for the model")
    args = parser.parse_args(arguments)

    def make() -> None:
        check_folders(args.out.parent)
        named = [name for _, name in text_lines(args.class_names)] if args.class_names else []
        model = similarity_model(
            args.backbone, args.weights, args.size, args.frames, args.distance, class_names=named or None
        )
        if args.videos:
            choose_threshold(model, args.videos, args.max_loss)
        print(f"Wrote {model.save_pretrained(args.out)}.")

    return command.run(make, "Nothing was written.", "Choose a smaller --backbone.")


if __name__ == "__main__":
    sys.exit(main())
