"""Draws what the demo's model did with one video, for the docs.

    python examples/sofnet_activitynet.py demo --out runs/demo
    python benchmarks/demo_picture.py --demo runs/demo --label squat_kick --out docs/images/timeline.png

It is the picture that the demo draws of this label, light and dark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from common import save_pair
from matplotlib.figure import Figure

from dynskip import StopOrForward, plot, video


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="where the demo ran")
    parser.add_argument("--label", required=True, help="of the video")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(arguments)
    model = StopOrForward.from_pretrained(args.demo / "gated" / "model")
    lines = (args.demo / "gated" / "videos.jsonl").read_text(encoding="utf-8").splitlines()
    record = [each for each in map(json.loads, lines) if each["labels"] == [args.label]][-1]
    path = args.demo / "videos" / "videos" / args.label / Path(record["video"]).name
    clip = video.Clips.of(model, [item for item in video.load_items(args.demo / "videos") if item.path == path])
    frames = clip[0, 0].video
    assert frames is not None
    answer = ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in record["answer"].items())

    def draw(dark: bool) -> Figure:
        return plot.timeline(
            frames.permute(0, 2, 3, 1), record["stopped_at"], model.backbone.stage_names, segments=record["relevant"],
            fallback_frame=record["fallback_frame"], title=f"{args.label}, recognised as {answer}", dark=dark,
        )  # fmt: skip

    save_pair(draw, args.out)


if __name__ == "__main__":
    main()
