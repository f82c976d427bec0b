"""Lazy videos: the answers of frames that are decoded up front, and only what is looked at is decoded."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("av")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import media  # noqa: E402
from helpers import assert_same, recipe, save_tiny_sofnet, toy_model  # noqa: E402
from PIL import Image  # noqa: E402

from dynskip import (  # noqa: E402
    CoarseToFine,
    DynskipError,
    EarlyTerminator,
    FrameOrder,
    LazyVideo,
    LookAhead,
    StopOrForward,
    VideoResult,
)
from dynskip.evaluation import evaluate  # noqa: E402
from dynskip.video import (  # noqa: E402
    Clips,
    EvaluationLoader,
    FrameSource,
    Item,
    LazyClips,
    Preprocessing,
    VideoError,
    lazy_frames,
    open_source,
    sample_frames,
)
from dynskip.video.lazy import AHEAD  # noqa: E402

PREP = Preprocessing(size=8, num_frames=12)
NAMES = ("x264.mp4", "vp9.webm", "open_gop.mkv", "vfr.mkv", "flat.h264")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [media.make(name, folder) for name in NAMES if media.has_encoder(name)]


def model_of(order: FrameOrder | None = None, ends: float | None = 0.3) -> StopOrForward:
    model = toy_model().float().eval()
    model.terminator = None if ends is None else EarlyTerminator(ends, min_frames=2)
    model.order = order
    return model


def up_front(path: Path, prep: Preprocessing = PREP) -> Tensor:
    return prep.normalize(prep.crop(sample_frames(open_source(path), prep.num_frames, prep.short_side)))


class Counted(FrameSource):
    """Frames of noise by their number, that counts which are read, and raises at some."""

    one_pass = ""

    def __init__(self, count: int = 100, bad: Sequence[int] = ()) -> None:
        self.count, self.bad = count, bad
        self.numbers: list[int] = []
        self.threads: set[int] = set()

    def __str__(self) -> str:
        return "counted"

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        self.numbers += numbers
        self.threads.add(threading.get_ident())
        if set(numbers) & set(self.bad):
            raise VideoError(f"counted: frame {numbers[0]} is damaged.")
        return [np.random.default_rng(n).integers(0, 256, (short_side, short_side, 3), np.uint8) for n in numbers]


def frames_of(source: Counted) -> Tensor:
    whole = Counted(source.count)
    return PREP.normalize(PREP.crop(sample_frames(whole, PREP.num_frames, PREP.short_side)))


@pytest.mark.parametrize("ends", [None, 0.3])
@pytest.mark.parametrize("order", [None, CoarseToFine()])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_answers_are_those_of_frames_decoded_up_front(
    files: list[Path], ends: float | None, order: FrameOrder | None, window: int | None
) -> None:
    model = model_of(order, ends)
    videos = torch.stack([up_front(path) for path in files])
    lengths = torch.tensor([12, 5, 9, 12, 7])[: len(files)]
    for some in (None, lengths):
        with LazyClips([open_source(path) for path in files], PREP) as clips:
            assert_same(model.run_clip(clips, window, some), model.run_clip(videos, window, some), exact=True)
            assert_same(model(clips, lengths=some), model(videos, lengths=some), exact=True)
            assert_same(model(clips, lengths=some, dense=True), model(videos, lengths=some, dense=True), exact=True)
    for path, video in zip(files, videos, strict=True):
        with LazyClips([open_source(path)], PREP, ahead=0) as clip:
            assert_same(model(clip), model(video[None]), exact=True)
        assert_same_frames(lazy_frames(open_source(path), PREP), video)


def assert_same_frames(frames: Iterator[Tensor], video: Tensor) -> None:
    assert all(torch.equal(one, other) for one, other in zip(frames, video, strict=True))


@pytest.mark.parametrize("order", [None, CoarseToFine()])
@pytest.mark.parametrize("ahead", [0, 2, AHEAD])
@pytest.mark.parametrize("window", [1, 3])
def test_what_is_never_looked_at_is_never_decoded(order: FrameOrder | None, ahead: int, window: int) -> None:
    model, source = model_of(order, ends=1e-9), Counted()
    model.look_ahead = LookAhead(window)
    with LazyClips([source], PREP, ahead=ahead) as clip:
        output = model(clip)
        looked_at = int((output.stopped_at >= 0).sum())
        loaded = clip.loaded()[0]
    assert looked_at == 3
    assert looked_at <= loaded.frames < looked_at + window
    assert loaded.frames <= len(source.numbers) <= loaded.frames + ahead
    assert len(set(source.numbers)) == len(source.numbers)  # none twice
    shown = clip.pictures(0)
    assert (shown.reshape(PREP.num_frames, -1).any(1)).sum() == len(source.numbers)


def test_a_clip_that_runs_again_decodes_nothing_again() -> None:
    model, source = model_of(), Counted()
    with LazyClips([source], PREP) as clip:
        outputs = [model(clip, dense=dense) for dense in (False, True, False)]
        assert sorted(source.numbers) == sorted(set(source.numbers))
        assert clip.loaded()[0].frames == len(clip.asked[0]) < PREP.num_frames
    assert_same(outputs[0], outputs[2], exact=True)


def test_frames_that_a_short_video_repeats_are_decoded_once() -> None:
    source = Counted(5)
    assert_same_frames(lazy_frames(source, PREP), frames_of(source))
    assert source.numbers == [0, 1, 2, 3, 4]


def test_a_frame_raises_only_where_it_is_needed() -> None:
    model = model_of(ends=1e-9)  # looks at three frames: 4, 12 and 20
    for bad, needed in ((28, False), (99, False), (20, True), (4, True)):
        source = Counted(bad=range(bad, 100))
        with LazyClips([source], PREP) as clip:
            if needed:
                with pytest.raises(VideoError, match=f"counted: frame {bad} is damaged"):
                    model(clip)
                assert list(clip.failed) == [0]
                with pytest.raises(VideoError):  # again
                    model(clip)
            else:
                assert_same(model(clip), model(frames_of(source)[None]))


def test_videos_of_a_batch_are_decoded_side_by_side_and_no_more_threads_than_cores() -> None:
    sources = [Counted() for _ in range(12)]
    with LazyClips(sources, PREP) as clips:
        model_of(ends=None)(clips)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
        assert 1 <= len(threads) <= (os.cpu_count() or 1)
    assert set().union(*(source.threads for source in sources)) <= {thread.ident for thread in threads}


@pytest.mark.parametrize("count", [100, 100_000])
def test_memory_does_not_grow_with_the_length_of_a_video(count: int) -> None:
    source = Counted(count)
    with LazyClips([source], PREP) as clip:
        model_of(ends=None)(clip)
        kept = clip._readers[0]._frames.values()
        assert sum(frame.untyped_storage().nbytes() for frame in kept) == PREP.clip_bytes


def test_closing_stops_decoding() -> None:
    source = Counted()
    with LazyClips([source], PREP) as clip:
        clip.expect(torch.arange(PREP.num_frames)[None])
    number = len(source.numbers)
    assert number <= AHEAD
    frames = lazy_frames(source, PREP)
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert len(source.numbers) == number + 1


def test_streams_pull_frames_from_files(files: list[Path]) -> None:
    model = model_of(ends=1e-9)
    sources = [(path.name, lazy_frames(open_source(path), PREP)) for path in files]
    found = {event.key: event for event in model.serve_streams(sources) if isinstance(event, VideoResult)}
    for path in files:
        alone = model.run_clip(up_front(path)[None], window=1)
        torch.testing.assert_close(found[path.name].logits, alone.logits[0])
        assert found[path.name].frames_seen == 3


def items_of(files: Sequence[Path]) -> list[Item]:
    return [Item(path, ("abcd"[number % 2],), "test") for number, path in enumerate(files)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_evaluation_of_lazy_videos(files: list[Path], batch_size: int, tmp_path: Path) -> None:
    model = model_of()
    clips = Clips(items_of(files), "abcd", PREP)
    eager, lazy = (EvaluationLoader(clips, batch_size, lazy=flag) for flag in (False, True))
    wanted, found = evaluate(model, eager), evaluate(model, lazy)
    timed = ("milliseconds", "frames_loaded", "frames_decoded", "decode_milliseconds")
    for one, other in zip(wanted.records, found.records, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
        assert other["frames_decoded"] >= other["frames_loaded"] >= sum(stop >= 0 for stop in other["stopped_at"])
    dense, _, early = (result.loaded for result in found.results)
    assert dense is not None
    assert early is not None
    assert dense.frames == PREP.num_frames > early.frames
    assert "decoded/video" in found.table()
    assert "decoded/video" not in wanted.table()
    assert any("flat.h264 was decoded" in note or "flat.h264: was decoded" in note for note in lazy.notes)


def test_evaluation_leaves_out_videos_that_turn_out_unreadable(files: list[Path], tmp_path: Path) -> None:
    gone, items = tmp_path / "gone.mp4", items_of(files[:3])
    bad = {files[1]: Counted(bad=range(50, 100))}
    loader = EvaluationLoader(
        Clips(
            [*items, Item(gone, ("a",), "test")], "abcd", PREP, opener=lambda path: bad.get(path) or open_source(path)
        ),
        batch_size=2,
        lazy=True,
    )
    found = evaluate(model_of(), loader)
    assert [record["video"] for record in found.records[:2]] == [str(files[0]), str(files[2])]
    assert found.results[0].videos == 2
    assert loader.unreadable == [f"{gone}: no such file."]
    assert list(found.unreadable) == ["counted: frame 54 is damaged."]


def mixed_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Make 20 files, good, damaged and odd; return them, and why some give no answer."""
    kept = ("x264.mp4", "x264.ts", "mpeg4.avi", "raw.y4m", "moves.gif", "flat.h264", "edit_list.mp4", "pause.mkv",
            "broken_x264.mp4", "missing_x264.mkv", "joined_x264.ts", "cut_off.mp4")  # fmt: skip
    paths = [media.make(name, folder) for name in kept]
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.fromarray(media.picture(number)).save(pictures / f"image_{number}.png")
    paths += [pictures, pictures / "image_1.png"]
    bad: dict[str, tuple[bytes | None, str]] = {
        "gone.mp4": (None, "no such file"),
        "empty.mp4": (b"", "is empty"),
        "words.mp4": (b"no video at all\n" * 50, "is text, no video"),
        "page.mp4": (b"<html>not found</html>", "is a web page"),
        "half.mp4": ((folder / "x264.mp4").read_bytes()[:2000], "is cut off"),  # its index is at the end
        "noise.mkv": (np.random.default_rng(0).bytes(3000), "not a readable video"),
    }
    for name, (content, _) in bad.items():
        paths.append(folder / name)
        if content is not None:
            paths[-1].write_bytes(content)
    return paths, {name: reason for name, (_, reason) in bad.items()}


@pytest.mark.filterwarnings("error::UserWarning")  # what is to be said, is said in the output
def test_every_file_has_an_answer_or_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("matplotlib")
    model, predict = save_tiny_sofnet(tmp_path / "model", Preprocessing(32, 4)), recipe("predict")
    paths, reasons = mixed_files(tmp_path)
    assert len(paths) == 20

    def run(*files: Path) -> int:
        return predict.main([str(model), *map(str, files), "--out", str(tmp_path / "out")])  # type: ignore[no-any-return]

    assert run(*paths) == 1
    said = capsys.readouterr()
    for path in paths:
        if path.name in reasons:
            assert f"error: {path}: {reasons[path.name]}" in said.err
        else:
            assert re.search(rf"^{path.name}: .*\n  frames: ", said.out, re.MULTILINE)
    assert "6 of 20 files could not be read." in said.err
    assert "damaged: 1 of 60 packets, 1 frame lost" in said.out
    assert "was decoded from its start, since its packets have no times" in said.out
    good = [path for path in paths if path.name not in reasons]
    assert run(*good[:2]) == 0
    assert re.search(r"\n  4 frames, \d+ decoded for them: \d+\.\d ms; network \d+\.\d ms\n", capsys.readouterr().out)
    assert run(*(path for path in paths if path.name in reasons)) == 2


class Computed(LazyVideo):
    """Frames that are computed when they are asked for."""

    def __init__(self, video: Tensor) -> None:
        super().__init__(video.shape)
        self.video = video

    def load(self, rows: Tensor, numbers: Tensor) -> Tensor:
        return self.video[rows, numbers]


def test_a_lazy_video_of_ones_own() -> None:
    model, video = model_of(ends=1e-9), torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    lazy = Computed(video)
    assert_same(model(lazy), model(video), exact=True)
    assert [loaded.frames for loaded in lazy.loaded()] == [3, 3]
    assert_same(model.train()(lazy, sample=False), model(video, sample=False), exact=True)
    model.eval()
    for wrong in (video[:, :, :2], video[:, :0], video[0]):
        with pytest.raises(DynskipError, match=r"must have shape \(B, T, 3, H, W\)"):
            model(Computed(wrong))
    wide = Computed(video.double())
    wide.dtype = torch.float64
    with pytest.raises(DynskipError, match=r"gives torch.float64 and the model is torch.float32"):
        model(wide)
    with pytest.raises(DynskipError, match="NaN or infinite"):
        model(Computed(video * float("nan")))
    with contextlib.suppress(NotImplementedError):
        lazy.rows([0])
        raise AssertionError
