from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import recipe, save_tiny_sofnet

pytest.importorskip("av")
pytest.importorskip("ray.data")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody

import loopback  # noqa: E402
import numpy as np  # noqa: E402
import ray  # noqa: E402

from dynskip import StopOrForward  # noqa: E402
from dynskip.video import Preprocessing, VideoError, open_video, stick_figures, to_array  # noqa: E402

cameras_ray = recipe("cameras_ray")  # Ray's workers cannot import it: they are sent what they need
PREP = Preprocessing(size=32, num_frames=4)
FPS = stick_figures.FPS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sofnet(tmp_path_factory.mktemp("saved") / "model", PREP)


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of files in the place of cameras; the last answer of each is of two frames."""
    root = tmp_path_factory.mktemp("cameras")
    set_ = stick_figures.render_set(root / "set", train_per_class=1, test_per_class=1, size=32, num_frames=36)
    files = sorted(file.relative_to(root) for file in set_.rglob("*.mp4"))[:5]
    list_ = root / "cameras.csv"
    list_.write_text("key,address\n" + "".join(f"camera {n},{file}\n" for n, file in enumerate(files)))
    return list_


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def signals() -> Iterator[None]:
    """Put back what the program does at signals."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def solo(model: Path, address: str) -> list[dict[str, Any]]:
    """What a model alone says of every second frame, four at a time."""
    loaded = StopOrForward.from_pretrained(model)
    with open_video(address) as (container, stream):
        pictures = [to_array(frame, PREP.short_side) for frame in container.decode(stream)][::2]
    rows = []
    for start in range(0, len(pictures), PREP.num_frames):
        clip = PREP.normalize(PREP.crop(np.stack(pictures[start : start + PREP.num_frames])))
        session = loaded.stream()
        for frame in clip:
            session(frame)
        rows.append(session.result().row(loaded.class_names))
    return rows


def answers(out: Path) -> dict[str, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {
        key: [line for line in lines if line["camera"] == key] for key in sorted({line["camera"] for line in lines})
    }


def assert_answers(out: Path, model: Path, cameras: dict[str, str]) -> None:
    """Every camera has every answer once, in order, and each is what the model alone says."""
    given = answers(out)
    for key, address in cameras.items():
        wanted = solo(model, address)
        assert [line["answer"] for line in given[key]] == list(range(1, len(wanted) + 1))
        for line, row in zip(given[key], wanted, strict=True):
            assert {name: line[name] for name in row} == pytest.approx(row)


def test_cameras_of_a_dead_actor_go_on_from_their_saved_states(
    cluster: None, model: Path, cameras: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    addresses = cameras_ray.read_cameras(cameras)
    owners = {key: cameras_ray.owner(key, ["actor 0", "actor 1"]) for key in addresses}
    assert set(owners.values()) == {"actor 0", "actor 1"}
    (tmp_path / "states").mkdir()
    args = argparse.Namespace(out=tmp_path, model=str(model), rate=FPS / 2, save_every=3, actors=2)
    fleet = cameras_ray.Fleet(addresses, args)
    ray.get([actor.where.remote() for actor in fleet.actors.values()])  # both are up
    killed: set[str] = set()  # cameras of the actor that dies which have a saved state
    for key, _ in fleet.run():
        if fleet.held[key] == owners[key] == "actor 0" and not killed:
            killed = {key for key in addresses if fleet.held[key] == "actor 0" and fleet.file(key).exists()}
            os.kill(int(fleet.up["actor 0"].split()[-1]), signal.SIGKILL)
    assert_answers(tmp_path, model, addresses)
    assert killed
    given = answers(tmp_path)
    for key in killed:
        assert given[key][-1]["since"] > 0, "it began anew"
    assert "actor 0 is lost, its cameras go on elsewhere" in capfd.readouterr().err


def test_a_run_that_is_stopped_goes_on(
    cluster: None, signals: None, model: Path, cameras: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(model), str(cameras), "--out", str(out), "--rate", str(FPS / 2), "--save-every", "3"]

    def stop() -> None:
        while not (out / "answers.jsonl").exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    assert cameras_ray.main(command) == 0
    stopper.join()
    some = answers(out)

    # A camera that fails ends alone.
    (tmp_path / "text.mp4").write_text("no video at all\n" * 99)
    more = tmp_path / "more.csv"
    addresses = cameras_ray.read_cameras(cameras)
    more.write_text("key,address\ndamaged,text.mp4\n" + "".join(f"{key},{at}\n" for key, at in addresses.items()))
    assert cameras_ray.main([str(model), str(more), *command[2:]]) == 1
    assert "text.mp4" in answers(out)["damaged"][0]["error"]
    assert_answers(out, model, addresses)
    assert all(lines == answers(out)[key][: len(lines)] for key, lines in some.items())
    assert ray.is_initialized()

    # Answers of another model do not go on in the same folder.
    other = save_tiny_sofnet(tmp_path / "other", PREP, seed=1)
    assert cameras_ray.main([str(other), *command[1:]]) == 2
    assert "The state is of another model" in capfd.readouterr().err


def test_live_cameras_give_the_newest_frames() -> None:
    """Their ticks count from where they are opened; closing ends the connection."""
    with loopback.camera(loopback.Play(loopback.transport_stream(50), "silent", 2.0)) as live:
        shown = cameras_ray.frames(live.address, 5.0, due=700, short_side=32)
        ticks = [next(shown)[0] for _ in range(3)]
        assert ticks[0] < 20
        assert ticks == sorted(set(ticks))
        shown.close()
    with pytest.raises(VideoError, match="nothing is there"):
        next(cameras_ray.frames("no/such/file.mp4", 5.0, 0, 32))


def test_damaged_packets_end_no_file(tmp_path: Path) -> None:
    data = loopback.transport_stream(40, good=20)
    (tmp_path / "a.ts").write_bytes(data)
    ticks = [due - 1 for due, _ in cameras_ray.frames(str(tmp_path / "a.ts"), 25.0, 0, 32)]
    assert len(ticks) >= 19
    assert ticks == sorted(set(ticks))


def test_a_file_that_is_over_stays_over(model: Path, cameras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    actor = cameras_ray.Actor(str(model), FPS / 2, 3)
    address = cameras_ray.read_cameras(cameras)["camera 0"]
    state, line, over = actor.watch("a", address, b"")
    told = [line]
    while not over:
        state, line, over = actor.watch("a", address, None)
        told.append(line)
    wanted = solo(model, address)
    lines = [line for line in told if line]
    assert [{name: line[name] for name in wanted[0]} for line in lines] == list(map(pytest.approx, wanted))
    assert [line["since"] for line in lines] == [0] * len(lines)
    assert actor.watch("b", address, state)[1:] == (None, True)


def test_only_the_cameras_of_a_dead_actor_move() -> None:
    names, keys = [f"actor {n}" for n in range(5)], [f"camera {n}" for n in range(500)]
    owners = {key: cameras_ray.owner(key, names) for key in keys}
    shares = [sum(owner == name for owner in owners.values()) for name in names]
    assert min(shares) > 60
    for name in names:
        left = [other for other in names if other != name]
        after = {key: cameras_ray.owner(key, reversed(left)) for key in keys}
        assert all(after[key] == owner for key, owner in owners.items() if owner != name)
        assert len({after[key] for key, owner in owners.items() if owner == name}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,address\ndoor,a.mp4\ndoor,b.mp4\n", "names 'door' more than once"),
        ("name,address\ndoor,a.mp4\n", "lacks the column key"),
    ],
)
def test_bad_lists(text: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cameras.csv").write_text(text)
    assert cameras_ray.main([str(model), str(tmp_path / "cameras.csv"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_answers_that_cannot_be_written_are_told_at_once(
    model: Path, cameras: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cameras_ray.main([str(model), str(cameras), "--out", str(cameras / "out")]) == 2
    assert "Could not write" in capsys.readouterr().err
