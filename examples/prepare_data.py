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

from dynskip import video
from dynskip.video import command
from dynskip.video.cache import FrameCache, kept_bytes
from dynskip.video.check import check_videos, is_clean, left_out, report_on, summary
from dynskip.video.outputs import check_files, check_folders


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

    def check() -> int:
        check_files(args.report)
        items = video.read_items(args.data, args.annotations, args.format, args.classes)
        prep = video.Preprocessing(args.size, args.frames)
        cache = FrameCache(args.cache, prep.num_frames, prep.short_side) if args.cache else None
        missing = sum(not cache.file(item.path).exists() for item in items) if cache else 0
        check_folders(args.cache, needed=kept_bytes(missing, prep.num_frames, prep.short_side))
        checks = check_videos(items, cache, args.workers)
        findings = list(tqdm(checks, "prepare", len(items), leave=False, disable=None))
        beside = left_out(items, [args.data, *args.annotations, args.classes, args.report])
        report = report_on(items, findings, args.frames, cache is not None, beside)
        print(summary(report))
        # A name that is not UTF-8 is kept with escapes, which JSON turns back into the name.
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        args.report.write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"Report: {args.report}")
        return 0 if is_clean(report) else 1

    kept = f"What is in {args.cache} stays." if args.cache else "Nothing was written."
    return command.run(check, f"{kept} The same command starts again.", "Use fewer --workers.")


if __name__ == "__main__":
    sys.exit(main())
