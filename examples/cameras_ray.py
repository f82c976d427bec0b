"""Watch many cameras with a model, on one machine or a cluster: one Ray actor a device.

    python examples/cameras_ray.py runs/mine/model cameras.csv --out runs/cameras

MODEL is a folder that `save_pretrained` or a recipe wrote; CAMERAS a CSV file with the columns key and address. Frames
go one at a time through an online session, --rate of them a second. As many as the model was trained on make one
answer, a line of OUT/answers.jsonl. Each --save-every frames, and with each answer, the session's state is saved in
OUT/states: if an actor dies, its cameras go on from there on others. So does the same command, started again.
docs/cameras.md tells more. GMACs are 10^9 multiply-adds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from dynskip import DynskipError, StopOrForward
from dynskip.video import LiveFrame, LiveSource, Preprocessing, command, open_video
from dynskip.video.annotations import read_rows
from dynskip.video.decoder import one_pass
from dynskip.video.files import pixel_aspect
from dynskip.video.lock import hold_folder
from dynskip.video.outputs import check_folders

try:
    import ray
except ImportError as error:
    raise SystemExit(
        f"error: This needs Ray ({error}). Install dynskip with the extras `examples` and `ray`."
    ) from None

Told: TypeAlias = tuple[bytes | None, dict[str, Any] | None, bool]  # to save, to write, and if a camera is over


def frames(address: str, rate: float, due: int, short_side: int) -> Generator[tuple[int, np.ndarray]]:
    """Yield the first frame of every tick, `rate` ticks a second, and the tick due next; if live, the newest one."""
    with contextlib.ExitStack() as opened:
        if Path(address).is_file():
            container, stream = opened.enter_context(open_video(Path(address)))
            aspect, pictures = pixel_aspect(stream), one_pass(container, stream)
            shown: Iterator[LiveFrame] = (
                LiveFrame(each, each.time or 0.0, 0, aspect) for each in pictures if each is not None
            )
        else:
            live = LiveSource(int(address) if address.isdecimal() else address)
            opened.callback(live.close)
            due, shown = 0, iter(live)
        for frame in shown:
            if (tick := int(frame.time * rate + 1e-6)) >= due:
                due = tick + 1
                yield due, frame.to_array(short_side)


class Camera:
    """A camera in an actor: its session, how far it got, and its frames."""

    def __init__(self, actor: Actor, address: str, saved: bytes) -> None:
        self.session = actor.model.stream()
        self.state: dict[str, Any] = {"looked": 0, "fresh": 0, "answers": 0, "due": 0}
        if saved:
            self.state = torch.load(io.BytesIO(saved), weights_only=True, map_location="cpu")
            self.session.load_state_dict(self.state.pop("session"))
        self.since = self.state["looked"]  # frames that were looked at before this actor took it over
        self.frames = frames(address, actor.rate, self.state["due"], actor.prep.short_side)

    def save(self) -> bytes:
        """Return what another actor needs to go on from here."""
        torch.save({**self.state, "session": self.session.state_dict()}, file := io.BytesIO())
        return file.getvalue()


class Actor:
    """A model on its device, and the cameras that it watches, each in a call of its own."""

    def __init__(self, model: str, rate: float, save_every: int) -> None:
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.model = StopOrForward.from_pretrained(model).to(self.device)
        self.prep, self.rate, self.save_every = Preprocessing.of(self.model), rate, save_every
        self.cameras: dict[str, Camera] = {}
        self.lock = threading.Lock()  # of the model

    def where(self) -> str:
        """Return the host and the process."""
        return f"host {socket.gethostname()}, process {os.getpid()}"

    def leave(self, key: str) -> None:
        """Let go of a camera."""
        self.cameras.pop(key).frames.close()

    def watch(self, key: str, address: str, saved: bytes | None) -> Told:
        """Watch a camera until there is something to tell; with a state, which may be empty, from there on."""
        try:
            with self.lock:
                if saved is not None:
                    self.cameras[key] = Camera(self, address, saved)
                camera, state = self.cameras[key], self.cameras[key].state
            for state["due"], picture in camera.frames:
                with self.lock:
                    camera.session(self.prep.normalize(self.prep.crop(picture[None]).to(self.device))[0])
                    state |= {"looked": state["looked"] + 1, "fresh": state["fresh"] + 1}
                    if state["fresh"] == self.prep.num_frames:
                        return *self._answer(key, camera), False
                    if state["looked"] % self.save_every == 0:
                        return camera.save(), None, False
            with self.lock:
                return *(self._answer(key, camera) if state["fresh"] else (camera.save(), None)), True
        except (DynskipError, OSError, ValueError) as error:
            return None, {"camera": key, "error": f"{type(error).__name__}: {error}"}, True

    def _answer(self, key: str, camera: Camera) -> tuple[bytes, dict[str, Any]]:
        """Return what the frames since the last answer say, and the state of starting anew."""
        row = camera.session.result().row(self.model.class_names)
        camera.session.reset()
        camera.state |= {"answers": camera.state["answers"] + 1, "fresh": 0}
        place = {"camera": key, "answer": camera.state["answers"], "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        return camera.save(), {**place, **row, "since": camera.since}


def owner(key: str, names: Iterable[str]) -> str:
    """Say which actor a camera goes to. Where one is gone, only its own cameras go elsewhere."""
    return max(names, key=lambda name: hashlib.sha256(f"{name} {key}".encode()).digest())


class Fleet:
    """Actors by name, and the cameras that are handed out to them."""

    def __init__(self, cameras: dict[str, str], args: argparse.Namespace) -> None:
        self.cameras, self.out = cameras, args.out
        gpus = int(ray.cluster_resources().get("GPU", 0))
        options = {"num_gpus": min(gpus, 1), "num_cpus": int(not gpus), "max_restarts": -1}
        make: Any = ray.remote(Actor).options(**options, max_concurrency=len(cameras) + 2)  # a thread waits for each
        names = [f"actor {n}" for n in range(args.actors or gpus or 1)]
        self.actors = {name: make.remote(args.model, args.rate, args.save_every) for name in names}
        self.up: dict[str, str] = {}  # actors that are up, and where
        self.held: dict[str, str] = {}  # the actor of each camera
        self.ready = dict.fromkeys(cameras, 0.0)  # cameras that are not over, and when each may go on
        self.deaths: Counter[str] = Counter()  # of actors with a camera, since it last got on: then it waits for longer
        self.calls = {self._begin(name): (name, "") for name in names}  # those in flight: actor, and camera or nothing

    def run(self, stopped: Sequence[bool] = ()) -> Iterator[tuple[str, Told]]:
        """Watch until all cameras are over, or `stopped` has an item; yield what was told of which camera."""
        while self.ready and not stopped:
            busy = {key for _, key in self.calls.values()}
            for key, ready in self.ready.items():
                if key not in busy and self.up and time.monotonic() >= ready:
                    self._watch(key, owner(key, self.up))
            for call in ray.wait(list(self.calls), timeout=1)[0]:
                name, key = self.calls.pop(call)
                try:
                    told = ray.get(call)
                except ray.exceptions.RayError as error:
                    self._lose(name, key, error)
                    continue
                if key:
                    self._note(key, *told)
                    yield key, told
                else:
                    self.up[name] = told
                    print(f"{name} is up: {told}.", file=sys.stderr)

    def _begin(self, name: str) -> Any:
        return self.actors[name].where.options(max_task_retries=-1).remote()

    def _watch(self, key: str, name: str) -> None:
        """Let an actor watch a camera; if another did before, from the last saved state on."""
        state, before, self.held[key] = None, self.held.get(key), name
        if before != name:
            state = self.file(key).read_bytes() if self.file(key).exists() else b""
            if before is not None:
                self.actors[before].leave.remote(key)
        self.calls[self.actors[name].watch.remote(key, self.cameras[key], state)] = name, key

    def _note(self, key: str, state: bytes | None, line: dict[str, Any] | None, over: bool) -> None:
        """Write down what an actor told: first the answer, then the state behind it."""
        if line:
            with (self.out / "answers.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if state:
            part = self.file(key).with_suffix(".part")
            part.write_bytes(state)
            os.replace(part, self.file(key))
        self.deaths[key] = 0
        if over:
            del self.ready[key]

    def _lose(self, name: str, key: str, error: Exception) -> None:
        """Note that an actor is lost. Ray starts it again; its cameras go on elsewhere."""
        if not key:
            raise DynskipError(f"{name} cannot be started: {error}") from error
        self.ready[key] = time.monotonic() + min(2 ** self.deaths[key] - 1, 300)
        self.deaths[key] += 1
        del self.held[key]
        if self.up.pop(name, None):
            print(f"{name} is lost, its cameras go on elsewhere: {error}", file=sys.stderr)
            self.calls[self._begin(name)] = name, ""

    def file(self, key: str) -> Path:
        """Return where a camera's state is saved. Keys may hold any character, and differ in case alone."""
        return Path(self.out, "states", f"{hashlib.sha256(key.encode()).hexdigest()}.pt")


def read_cameras(file: Path) -> dict[str, str]:
    """Read keys and addresses; files are found from the list's folder."""
    rows = [(row["key"], row["address"]) for _, row in read_rows(file, ("key", "address"))]
    if twice := [key for key, count in Counter(key for key, _ in rows).items() if count > 1]:
        raise DynskipError(f"{file} names {twice[0]!r} more than once. Each camera has a key of its own.")
    return {key: str(path.resolve()) if (path := file.parent / at).exists() else at for key, at in rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a saved model, or its name on the Hugging Face Hub")
    add("cameras", metavar="CAMERAS", type=Path, help="CSV file with the columns key and address")
    add("--out", type=Path, required=True, help="folder for answers and states; only this machine needs it")
    add("--rate", type=float, default=4.0, help="frames a second of a camera that are looked at (default: 4)")
    add("--save-every", type=int, default=8, help="frames of a camera between two saved states (default: 8)")
    add("--actors", type=int, help="copies of the model (default: one a GPU, or one without any)")
    return command.run(lambda: watch(parser.parse_args(arguments)), "What is written stays; the same command goes on.")


def watch(args: argparse.Namespace) -> int:
    """Watch all cameras; return 1 if one of them failed."""
    cameras, session = read_cameras(args.cameras), StopOrForward.from_pretrained(args.model).stream()
    check_folders(args.out / "states")
    for file in (args.out / "states").glob("*.pt"):  # says if they are of another model
        session.load_state_dict(torch.load(file, weights_only=True, map_location="cpu")["session"])
    stopped = list[bool]()
    with hold_folder(args.out):
        ray.init(ignore_reinit_error=True)  # joins the cluster that RAY_ADDRESS names, or starts one, until the end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.append(True))
        return min(1, sum(over and state is None for _, (state, _, over) in Fleet(cameras, args).run(stopped)))


if __name__ == "__main__":
    sys.exit(main())
