"""Check a data set before training: what is missing, unreadable or short, and what there is of each class.

python examples/prepare_data.py --data DIR
python examples/prepare_data.py --data DIR --cache cache        # and keep decoded frames for training
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dynskip import DynskipError, video
from dynskip.video.cache import FrameCache
from dynskip.video.check import check_videos, is_clean, report_on, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if videos would be left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help="annotation files of another format")
    add("--format", help="of the annotations: csv, activitynet, thumos, list, list-labels; by default told from them")
    add("--classes", type=Path, metavar="FILE", help="class list (index,name), for annotations that number classes")
    add("--cache", type=Path, metavar="DIR", help="keep decoded frames there")
    add("--size", type=int, default=168, help="height and width that frames are kept for (default: 168)")
    add("--frames", type=int, default=16, help="frames of a video (default: 16)")
    add("--report", type=Path, default=Path("prepare.json"), help="file for all that was found (default: prepare.json)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes that decode videos")
    args = parser.parse_args(arguments)
    try:
        items = video.read_items(args.data, args.annotations, args.format, args.classes)
        prep = video.Preprocessing(args.size, args.frames)
        cache = FrameCache(args.cache, prep.num_frames, prep.short_side) if args.cache else None
        checks = check_videos(items, cache, args.workers)
        findings = list(tqdm(checks, "prepare", len(items), leave=False, disable=None))
        report = report_on(items, findings, args.frames, cache is not None)
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (DynskipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{summary(report)}\nReport: {args.report}")
    return 0 if is_clean(report) else 1


if __name__ == "__main__":
    sys.exit(main())
