"""Gates that need no training, around a finished classifier: stop frames that are much like the last used one.

    python examples/similarity_gates.py --backbone resnet50 --weights FILE --out runs/similar

It writes a folder that predict.py, stream_video.py, corpus_ray.py and evaluate.py take. docs/gates.md has other gates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from dynskip import DynskipError, FixedGate, SimilarityGate, StopOrForward, stage_model, video
from dynskip.backbone.weights import load_weights
from dynskip.video import command
from dynskip.video.annotations import text_lines
from dynskip.video.outputs import check_folders


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
        backbone = stage_model(args.backbone, input_size=(3, args.size, args.size), pretrained=args.weights == "hub")
        network: Any = backbone.model
        if args.weights != "hub" and not load_weights(network, args.weights):
            raise DynskipError(f"{args.weights} has another number of classes than timm's {args.backbone}.")
        first, *others = backbone.num_features
        model = StopOrForward(backbone, [SimilarityGate(first, args.distance), *(FixedGate() for _ in others)])
        info, count = ImageNetInfo(), backbone.num_classes
        known = count == info.num_classes()
        names = [info.index_to_description(i) if known else f"class {i}" for i in range(count)]
        model.class_names = [name for _, name in text_lines(args.class_names)] if args.class_names else names
        mean, std = (tuple(network.pretrained_cfg[key]) for key in ("mean", "std"))
        model.preprocessing = video.Preprocessing(args.size, args.frames, mean, std).to_dict()
        print(f"Wrote {model.eval().save_pretrained(args.out)}.")

    return command.run(make, "Nothing was written.", "Choose a smaller --backbone.")


if __name__ == "__main__":
    sys.exit(main())
