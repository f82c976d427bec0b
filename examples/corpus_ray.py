"""Classify a corpus of videos of any size, on one machine or a cluster, with Ray Data.

    python examples/corpus_ray.py runs/mine/model VIDEOS --out runs/corpus
    python examples/corpus_ray.py runs/mine/model paths.txt --out runs/corpus

MODEL is a folder that `save_pretrained` or a recipe wrote; similarity_gates.py makes one without training. VIDEOS is a
folder, searched with all its folders, or a text file with one path a line. CPU workers decode; each actor of a pool
holds the model on its device and runs many videos at once (`model.serve_streams`). Ray keeps only as many decoded
videos in memory as the actors can take. Results are Parquet files in OUT/videos, one row a video, written as they come.
The same command again does only what is missing. What failed is listed in OUT/failed.csv and tried again then.
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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynskip import DynskipError, StopOrForward, VideoResult
from dynskip.activation import confidence, named_classes
from dynskip.video import MachineError, Preprocessing, VideoError, command, open_source, sample_frames
from dynskip.video.files import VIDEO_SUFFIXES
from dynskip.video.outputs import check_folders

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
except ImportError as error:
    raise SystemExit(f"error: This needs Ray Data ({error}). Run `pip install 'dynskip[examples,ray]'`.") from None

COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("used", pa.int64()),  # frames that passed every gate
        ("seen", pa.int64()),  # frames looked at
        ("fallback", pa.bool_()),  # no frame was used: the furthest one answered
        ("gmacs", pa.float64()),  # executed
        ("error", pa.string()),  # why there is no answer; null where there is one
    ]
)

# ------------------------------------------------------------------------------------------------------ the workers


def decode(row: dict[str, Any], prep: Preprocessing) -> dict[str, Any]:
    """Add to a row the bytes of the video's frames `(T, 3, H, W)`, or the error why there are none."""
    try:
        clip = prep.crop(sample_frames(open_source(Path(row["path"])), prep.num_frames, prep.short_side))
    except (VideoError, MachineError) as error:  # the latter's videos have their turn in the next run
        return {**row, "frames": b"", "error": str(error)}
    return {**row, "frames": clip.numpy().tobytes(), "error": ""}


class Classify:
    """An actor: a model on its device, which takes many decoded videos at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.streams = args.streams
        self.model = StopOrForward.from_pretrained(args.model).to(self.device)
        self.prep = Preprocessing.of(self.model)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Return a row for every video of a batch."""
        rows = [
            {"path": path, "error": error or None} for path, error in zip(batch["path"], batch["error"], strict=True)
        ]
        sources = ((i, self._frames(frames)) for i, frames in enumerate(batch["frames"]) if rows[i]["error"] is None)
        for event in self.model.serve_streams(sources, max_streams=self.streams, batch_size=self.streams):
            if isinstance(event, VideoResult) and isinstance(event.key, int):
                rows[event.key] |= self._answer(event)
        return pa.Table.from_pylist(rows, schema=COLUMNS)

    def _frames(self, frames: bytes) -> Iterator[torch.Tensor]:
        size = self.prep.size
        clip = torch.frombuffer(bytearray(frames), dtype=torch.uint8).view(-1, 3, size, size)
        for frame in clip:  # one at a time, so that what the model never asks for is not prepared
            yield self.prep.normalize(frame.to(self.device))

    def _answer(self, result: VideoResult) -> dict[str, Any]:
        if result.error is not None:
            return {"error": f"{type(result.error).__name__}: {result.error}"}
        answer = named_classes(result.probabilities, result.activation)
        return {
            "label": ", ".join(self.model.class_names[n] if self.model.class_names else str(n) for n in answer),
            "probability": float(confidence(result.probabilities, result.activation)),
            "used": result.frames_used,
            "seen": result.frames_seen,
            "fallback": result.fallback_frame >= 0,
            "gmacs": result.macs / 1e9,
        }


# ------------------------------------------------------------------------------------------------------- the corpus


def find_videos(corpus: Path) -> list[str]:
    """Paths of all videos of a folder, or those that a text file names, relative to it; sorted, each once."""
    if corpus.is_dir():
        found = {path for path in corpus.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()}
    elif corpus.is_file():
        try:
            lines = corpus.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DynskipError(f"{corpus} is no text ({error}). Expected a folder, or one path a line.") from error
        found = {corpus.parent / line.strip() for line in lines if line.strip()}
    else:
        raise DynskipError(f"{corpus} does not exist. Give a folder of videos, or a text file with one path a line.")
    if not found:
        raise DynskipError(f"{corpus} has no videos. They end in {', '.join(VIDEO_SUFFIXES)}.")
    return sorted({os.path.abspath(path) for path in found})


def read_results(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Paths that have an answer, and the errors of those that have none. A file cut off by a kill is set aside."""
    done: set[str] = set()
    errors: dict[str, str] = {}
    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file, columns=["path", "error"])
        except (pa.ArrowException, OSError) as error:
            print(f"{file} is damaged ({error}); its videos are done again.", file=sys.stderr)
            file.rename(file.with_suffix(".damaged"))
            continue
        for path, reason in zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True):
            if reason is None:
                done.add(path)
            else:
                errors[path] = reason
    return done, {path: reason for path, reason in errors.items() if path not in done}


def check_model(out: Path, model: str) -> None:
    """Note which model the answers are of, or compare it with what an earlier run noted: one table has one model."""
    folder, file = Path(model), out / "model.json"
    found = {"model": model}
    if folder.is_dir():
        found = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("config.json", "model.safetensors")
        }
    if file.is_file():
        if json.loads(file.read_text()) != found:
            raise DynskipError(f"{out} holds the answers of another model. Choose another --out.")
        return
    out.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(part, file)


def classify(paths: Sequence[str], args: argparse.Namespace, prep: Preprocessing) -> None:
    """Run videos through Ray Data into Parquet files."""
    if gpus := int(ray.cluster_resources().get("GPU", 0)):
        actors, cpus_each, gpus_each = args.actors or gpus, 0.0, 1.0
    else:
        cpus = ray.cluster_resources().get("CPU", 1.0)
        actors = args.actors or max(1, int(cpus / args.actor_cpus) // 2)
        cpus_each, gpus_each = args.actor_cpus, 0.0
        if actors * args.actor_cpus > cpus - 1:
            raise DynskipError(
                f"{actors} actors of {args.actor_cpus:g} CPUs leave none of {cpus:g} to decode with. Lower --actors or "
                "--actor-cpus."
            )
    rows = [{"path": path} for path in paths]
    blocks = math.ceil(len(rows) / args.batch)
    (
        ray.data.from_items(rows, override_num_blocks=blocks)
        .map(partial(decode, prep=prep))
        .map_batches(
            Classify,
            fn_constructor_args=(args,),
            batch_size=args.batch,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=cpus_each,
            num_gpus=gpus_each,
        )
        .write_parquet(str(args.out / "videos"))
    )


# ----------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("model", metavar="MODEL", help="folder of a saved model, or its name on the Hugging Face Hub")
    add("corpus", metavar="VIDEOS", type=Path, help="a folder, or a text file with one path a line")
    add("--out", type=Path, required=True, help="folder for the results; every machine must see it")
    add("--actors", type=int, help="copies of the model (default: one a GPU, or on half of the CPUs)")
    add("--actor-cpus", type=float, default=1.0, help="CPUs of an actor where there are no GPUs (default: 1)")
    add("--streams", type=int, default=16, help="videos that an actor runs at once (default: 16)")
    add("--batch", type=int, default=64, help="videos that an actor is handed at a time (default: 64)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)
    return command.run(
        lambda: run(args), "The same command goes on from what is written.", "Lower --streams or --batch."
    )


def run(args: argparse.Namespace) -> int:
    """Classify what has no answer yet; return 1 if some videos have none in the end."""
    check_folders(args.out / "videos")
    paths = find_videos(args.corpus)
    model = StopOrForward.from_pretrained(args.model)  # what is wrong with it is said once, before anything starts
    check_model(args.out, args.model)
    done, _ = read_results(args.out / "videos")
    missing = [path for path in paths if path not in done]
    print(f"{len(paths)} videos, {len(paths) - len(missing)} of them done.")
    if missing:
        started = not ray.is_initialized()
        try:
            if started:
                ray.init()  # joins the cluster that RAY_ADDRESS names, or starts one of this machine
            classify(missing, args, Preprocessing.of(model))
        except ray.exceptions.RayError as error:
            raise DynskipError(f"Ray gave up: {error}\nWhat is written stays; the same command goes on.") from error
        finally:
            if started:
                ray.shutdown()
    return report(paths, args.out)


def report(paths: Sequence[str], out: Path) -> int:
    """Say how many videos have an answer, and list those that have none."""
    done, errors = read_results(out / "videos")
    failed = [(path, errors.get(path, "no answer was written")) for path in paths if path not in done]
    with (out / "failed.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "error"), *failed])
    print(f"{len(paths) - len(failed)} of {len(paths)} videos have an answer in {out / 'videos'}.")
    if failed:
        print(f"{len(failed)} failed, listed in {out / 'failed.csv'}. The first:", file=sys.stderr)
        for _, error in failed[:5]:
            print(f"  {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
