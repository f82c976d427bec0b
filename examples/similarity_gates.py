"""Gates that need no training, around a finished classifier: stop frames that are much like the last used one.

    python examples/similarity_gates.py --backbone resnet50 --weights FILE --out runs/similar

It writes a folder that predict.py, stream_video.py, corpus_ray.py and evaluate.py take. docs/gates.md has other gates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynskip.video import command
from dynskip.video.annotations import text_lines
from dynskip.video.outputs import check_folders
from dynskip.video.similar import similarity_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="resnet50", help="any timm model (default: resnet50)")
    add("--weights", default="hub", help="of the backbone: 'hub' downloads timm's (default), or a FILE")
    add("--distance", type=float, default=0.003, help="stop frames this close to the last used one (default: 0.003)")
    add("--size", type=int, default=168, help="height and width of the frames in pixels (default: 168)")
    add("--frames", type=int, default=16, help="frames of a video (default: 16)")
    add("--class-names", type=Path, metavar="FILE", help="a name a line (default: ImageNet's, or numbers)")
    add("--out", type=Path, required=True, help="new folder for the model")
    args = parser.parse_args(arguments)

    def make() -> None:
        check_folders(args.out.parent)
        model = similarity_model(args.backbone, args.weights, args.size, args.frames, args.distance)
        if args.class_names:
            model.class_names = [name for _, name in text_lines(args.class_names)]
        print(f"Wrote {model.save_pretrained(args.out)}.")

    return command.run(make, "Nothing was written.", "Choose a smaller --backbone.")


if __name__ == "__main__":
    sys.exit(main())
