"""Classify a corpus of videos of any size, on one machine or a cluster, with Ray Data.

    python examples/corpus_ray.py runs/mine/model VIDEOS --out runs/corpus
    python examples/corpus_ray.py runs/mine/model paths.txt --out runs/corpus

MODEL is a folder that `save_pretrained` or a recipe wrote; similarity_gates.py makes one without training. VIDEOS is a
folder, searched with all its folders, or a text file with one path a line. Each actor of a pool holds the model on its
device and runs many videos at once (`model.serve_streams`); threads decode a few frames ahead of it, and what the model
never looks at is never decoded. Results are Parquet files in OUT/videos, one row a video, written as they come. The
same command again does what is missing, what failed (listed in OUT/failed.csv), and videos that were replaced.
docs/corpus.md tells how this file runs on a cluster. GMACs are 10^9 multiply-adds.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynskip import DynskipError, StopOrForward, VideoResult
from dynskip.video import LazyClips, Preprocessing, command, names, open_source
from dynskip.video.lock import hold_folder
from dynskip.video.outputs import check_folders

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
except ImportError as error:
    raise SystemExit(
        f"error: This needs Ray Data ({error}). Install dynskip with the extras `examples` and `ray`."
    ) from None

COLUMNS = pa.schema(
    [
        ("path", pa.string()),  # what is no UTF-8 in it is escaped
        ("path_bytes", pa.binary()),  # the path itself: os.fsdecode
        ("stamp", pa.string()),  # size and time of the file that was read
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("used", pa.int64()),  # frames that passed every gate
        ("seen", pa.int64()),  # frames looked at
        ("fallback", pa.bool_()),  # no frame was used: the furthest one answered
        ("gmacs", pa.float64()),  # executed
        ("decoded", pa.int64()),  # frames that were decoded, those included that others needed
        ("decode_ms", pa.float64()),  # of the threads that decoded
        ("network_ms", pa.float64()),  # its share, by MACs, of what the batch took but for waiting for frames
        ("notes", pa.string()),  # what of the file is lost, and why it was decoded as a whole
        ("error", pa.string()),  # why there is no answer; null where there is one
    ]
)


class Classify:
    """An actor: a model on its device, which takes many videos at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.streams = args.streams
        self.model = StopOrForward.from_pretrained(args.model).to(self.device)
        self.prep = Preprocessing.of(self.model)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Return a row for every video of a batch."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        self.clips: dict[int, LazyClips] = {}
        self.waited, begin = 0.0, time.perf_counter()
        sources = ((number, self._frames(number, row["path_bytes"])) for number, row in enumerate(rows))
        for event in self.model.serve_streams(sources, max_streams=self.streams, batch_size=self.streams):
            if isinstance(event, VideoResult) and isinstance(event.key, int):
                rows[event.key] |= self._answer(event, self.clips.pop(event.key, None))
        milliseconds = 1000 * (time.perf_counter() - begin - self.waited)
        each = milliseconds / (sum(row.get("gmacs", 0.0) for row in rows) or 1.0)
        rows = [{**row, "network_ms": each * row["gmacs"]} if "gmacs" in row else row for row in rows]
        return pa.Table.from_pylist(rows, schema=COLUMNS)

    def _frames(self, number: int, path: bytes) -> Iterator[torch.Tensor]:
        begin = time.perf_counter()
        with LazyClips([open_source(Path(os.fsdecode(path)))], self.prep, self.device) as clip:
            self.clips[number] = clip
            clip.begin(torch.arange(self.prep.num_frames)[None])
            for frame in torch.arange(self.prep.num_frames)[:, None]:
                image = clip.take(torch.zeros_like(frame), frame, self.device)
                self.waited += time.perf_counter() - begin
                yield image[0]
                begin = time.perf_counter()

    def _answer(self, result: VideoResult, clip: LazyClips | None) -> dict[str, Any]:
        if result.error is not None or clip is None:
            return {"error": shown(f"{type(result.error).__name__}: {result.error}")}
        (source,), (cost,) = clip.sources, clip.loaded()
        notes = "; ".join(filter(None, (source.damage, source.one_pass and f"decoded as a whole: {source.one_pass}")))
        told = {"decoded": cost.decoded, "decode_ms": cost.milliseconds, "notes": shown(notes) or None}
        return {**result.row(self.model.class_names), **told}


def shown(text: str) -> str:
    """Escape what is no UTF-8 in a path, or a text about it."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------- the corpus


def find_videos(corpus: Path) -> list[str]:
    """Paths of all videos of a folder, or those that a text file names, relative to it; sorted, each once."""
    found: list[Path] = []
    if corpus.is_dir():
        found, left_out = names.find_videos(corpus)
        if left_out:
            print(f"{left_out.total()} other files were left out ({names.counts_text(left_out)}).")
    elif corpus.is_file():
        text, folder = os.fsdecode(corpus.read_bytes().removeprefix(b"\xef\xbb\xbf")), names.VideoFolder(corpus.parent)
        if "\0" in text:
            raise DynskipError(f"{corpus} is no text. Expected a folder, or one path a line.")
        for line in filter(str.strip, text.replace("\r\n", "\n").split("\n")):
            exact = folder.path(line)
            found.append(exact if exact.exists() else folder.path(line.strip()))
    else:
        raise DynskipError(f"{corpus} does not exist. Give a folder of videos, or a text file with one path a line.")
    if not found:
        raise DynskipError(f"{corpus} has no videos. Give a folder of videos, or a text file with one path a line.")
    return sorted({os.path.abspath(path) for path in found})


def stamp(path: str) -> str:
    """What changes when a video is replaced; empty if it is not there."""
    try:
        return names.stamp(Path(path))
    except OSError:
        return ""


def read_results(folder: Path) -> Iterator[tuple[Path, pa.Table, list[dict[str, Any]]]]:
    """Yield the files of results, their tables, and of which video each row is. What a kill cut off is set aside."""
    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file).select(COLUMNS.names)
        except (pa.ArrowException, OSError, KeyError) as error:
            print(f"{file} is damaged ({error}); its videos are done again.", file=sys.stderr)
            file.rename(file.with_suffix(".damaged"))
            continue
        rows = table.select(["path_bytes", "stamp", "error"]).to_pylist()
        yield file, table, [{**row, "path": os.fsdecode(row["path_bytes"])} for row in rows]


def forget(folder: Path, stamps: dict[str, str]) -> set[str]:
    """Take rows of videos that failed or were replaced out of the results; return the paths of those with an answer."""
    done: set[str] = set()
    for file, table, rows in read_results(folder):
        right = [row["error"] is None and row["stamp"] == stamps.get(row["path"]) for row in rows]
        keep = [ok or row["path"] not in stamps for ok, row in zip(right, rows, strict=True)]
        done |= {row["path"] for ok, row in zip(right, rows, strict=True) if ok}
        if not all(keep):
            pq.write_table(table.filter(pa.array(keep)), part := file.with_suffix(".part"))
            os.replace(part, file)
    return done


def check_model(out: Path, model: str) -> None:
    """Note which model the answers are of, or compare it with what an earlier run noted: one table has one model."""
    folder, file = Path(model), out / "model.json"
    found = {"model": model}
    if folder.is_dir():
        weights = ("config.json", "model.safetensors")
        found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in weights}
    if file.is_file() and json.loads(file.read_text()) != found:
        raise DynskipError(f"{out} holds the answers of another model. Choose another --out.")
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(part, file)


def classify(stamps: dict[str, str], args: argparse.Namespace) -> None:
    """Run videos through Ray Data into Parquet files."""
    gpus, cpus = (ray.cluster_resources().get(kind, 0.0) for kind in ("GPU", "CPU"))
    # Threads that decode need the other half of the CPUs.
    actors = args.actors or int(gpus) or max(1, int(cpus / args.actor_cpus) // 2)
    if not gpus and actors * args.actor_cpus > cpus:
        raise DynskipError(f"{actors} actors of {args.actor_cpus:g} CPUs need more than {cpus:g}. Lower one of them.")
    rows = [{"path": shown(path), "path_bytes": os.fsencode(path), "stamp": stamps[path]} for path in stamps]
    (
        ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / args.batch))
        .map_batches(
            Classify,
            fn_constructor_args=(args,),
            batch_size=args.batch,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0 if gpus else args.actor_cpus,
            num_gpus=int(gpus > 0),
        )
        .write_parquet(str(args.out / "videos"))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a saved model, or its name on the Hugging Face Hub")
    add("corpus", metavar="VIDEOS", type=Path, help="a folder, or a text file with one path a line")
    add("--out", type=Path, required=True, help="folder for the results; every machine must see it")
    add("--actors", type=int, help="copies of the model (default: one a GPU, or on half of the CPUs)")
    add("--actor-cpus", type=float, default=1.0, help="CPUs of an actor where there are no GPUs (default: 1)")
    add("--streams", type=int, default=16, help="videos that an actor runs at once (default: 16)")
    add("--batch", type=int, default=64, help="videos that an actor is handed at a time (default: 64)")
    goes_on = "The same command goes on from what is written."
    return command.run(lambda: run(parser.parse_args(arguments)), goes_on, "Lower --streams or --batch.")


def run(args: argparse.Namespace) -> int:
    """Classify what has no answer yet; return 1 if some videos have none in the end."""
    stamps = {path: stamp(path) for path in find_videos(args.corpus)}
    StopOrForward.from_pretrained(args.model)  # what is wrong with it is said once, before anything starts
    check_folders(args.out / "videos")
    with hold_folder(args.out):
        check_model(args.out, args.model)
        done = forget(args.out / "videos", stamps)
        missing = {path: found for path, found in stamps.items() if path not in done}
        print(f"{len(stamps)} videos, {len(stamps) - len(missing)} of them done.")
        if missing:
            started = not ray.is_initialized()
            try:
                if started:
                    ray.init()  # joins the cluster that RAY_ADDRESS names, or starts one of this machine
                classify(missing, args)
            except ray.exceptions.RayError as error:
                raise DynskipError(f"Ray gave up: {error}\nWhat is written stays; the same command goes on.") from error
            finally:
                if started:
                    ray.shutdown()
        return report(stamps, args.out)


def report(paths: Iterable[str], out: Path) -> int:
    """Say how many videos have an answer, and list those that have none."""
    errors: dict[str, str | None] = dict.fromkeys(paths, "no answer was written")
    for _, _, rows in read_results(out / "videos"):
        errors |= {row["path"]: row["error"] for row in rows if row["path"] in errors}
    failed = [(shown(path), error) for path, error in errors.items() if error is not None]
    with (out / "failed.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "error"), *failed])
    print(f"{len(errors) - len(failed)} of {len(errors)} videos have an answer in {out / 'videos'}.")
    if failed:
        first = "\n  ".join(str(error) for _, error in failed[:5])
        print(f"{len(failed)} failed, listed in {out / 'failed.csv'}. The first:\n  {first}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
