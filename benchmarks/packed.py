"""Pictures of all clips, packed into a few small video files that go where a GPU is, and crops of them."""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compose_untrimmed import CLIP_STEPS
from torch import Tensor
from tqdm import tqdm

from dynskip import DynskipError, video
from dynskip.video.outputs import whole_file

PICTURES, HEIGHT, WIDTH, FILES = 48, 144, 192, 16
A_STEP = PICTURES // CLIP_STEPS
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pack(data: Path, folder: Path, quick: bool) -> None:
    """Write the pictures of all clips into a few video files, and a list of the clips."""
    import av

    items = video.load_items(data)
    if quick:
        items = [item for item in items if re.search(r"_g(0\d|10)_c01", item.path.name)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(tqdm(np.array_split(np.arange(len(items)), FILES), "pack", disable=None)):
        with av.open(str(folder / f"part{number:02d}.mp4"), "w") as container:
            # A clip begins with a picture that needs no other one.
            stream: Any = container.add_stream("libx264", Fraction(10), {"crf": "23", "g": str(PICTURES)})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for row in part:
                frames = torch.from_numpy(video.sample_frames(video.open_source(items[row].path), PICTURES, HEIGHT))
                small = F.interpolate(frames.permute(0, 3, 1, 2).float(), (HEIGHT, WIDTH), mode="area")
                for picture in small.round().byte().permute(0, 2, 3, 1).numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    names = [[item.path.name, item.labels[0]] for item in items]
    (folder / "clips.json").write_text(json.dumps(names), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.glob("part*.mp4"))
    print(f"{len(items)} clips, {size / 1e6:.1f} MB in {folder}")


def pictures_of(file: Path) -> np.ndarray:
    """Decode a packed file, `(pictures, 3, H, W)`."""
    try:
        import cv2  # type: ignore[import-not-found]

        capture, found = cv2.VideoCapture(str(file)), []
        while (read := capture.read())[0]:
            found.append(read[1][:, :, ::-1])
    except ImportError:
        import av

        with av.open(str(file)) as container:
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pictures: np.ndarray = np.stack(found).transpose(0, 3, 1, 2)
    return pictures


def unpack(folder: Path) -> None:
    """Decode all packed files into one array on disk, which the folds share."""
    file = folder / "frames.npy"
    if file.exists():
        return
    with ProcessPoolExecutor() as pool:
        frames = np.concatenate(list(pool.map(pictures_of, sorted(folder.glob("part*.mp4")))))
    clips = len(json.loads((folder / "clips.json").read_text(encoding="utf-8")))
    if len(frames) != clips * PICTURES:
        raise DynskipError(
            f"{folder} has {len(frames)} pictures for {clips} clips; expected {PICTURES} each. Pack again."
        )
    with whole_file(file) as opened:
        np.save(opened, frames)


class Pictures:
    """All pictures, on the device, and crops of them, normalised as a network's weights want it."""

    def __init__(self, folder: Path, size: int, device: str, network: Any = None) -> None:
        self.frames = torch.from_numpy(np.load(folder / "frames.npy", mmap_mode="c")).to(device)
        self.size, self.device = size, device
        wanted = getattr(network, "pretrained_cfg", {"mean": MEAN, "std": STD})
        self.mean, self.std = (torch.tensor(wanted[name], device=device).view(3, 1, 1) for name in ("mean", "std"))

    def crop(self, rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Crop pictures to normalised squares: `(M, 2)` scales and shifts of both axes, as shares of half a side."""
        theta = torch.zeros(len(rows), 2, 3, device=self.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], shift
        images = self.frames[rows].float() / 255
        grid = F.affine_grid(theta, [len(rows), 3, self.size, self.size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def middle(self, clip: Tensor, step: Tensor) -> Tensor:
        """Return the middle crop of the middle picture of each step: `(V, T) -> (V, T, 3, size, size)`."""
        rows = ((clip * CLIP_STEPS + step) * A_STEP + A_STEP // 2).flatten().to(self.device)
        scale = torch.tensor([HEIGHT / WIDTH, 1.0], device=self.device) * 7 / 8
        images = self.crop(rows, scale.expand(len(rows), 2), torch.zeros(len(rows), 2, device=self.device))
        return images.view(*clip.shape, *images.shape[1:])

    def drawn(self, clip: Tensor, step: Tensor, shot: Tensor, seed: int) -> Tensor:
        """The same of random pictures, with a random crop that may be mirrored, the same in a shot."""
        generator = torch.Generator().manual_seed(seed)
        videos, frames = clip.shape
        draws = torch.rand(videos, frames, 5, generator=generator)
        draws = draws.gather(1, shot[..., None].expand(-1, -1, 5)).flatten(0, 1)  # of the frame with the shot's number
        area, ratio = 0.35 + 0.65 * draws[:, 0], torch.exp((draws[:, 1] - 0.5) / 2)
        high = (area / ratio).sqrt().clamp(max=1)
        wide = ((area * ratio).sqrt() * HEIGHT / WIDTH).clamp(max=1)
        scale = torch.stack([wide, high], 1)
        shift = (2 * draws[:, 2:4] - 1) * (1 - scale)
        scale[:, 0] *= torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
        picture = torch.randint(A_STEP, (videos * frames,), generator=generator)
        rows = ((clip * CLIP_STEPS + step) * A_STEP).flatten() + picture
        images = self.crop(rows.to(self.device), scale.to(self.device), shift.to(self.device))
        return images.view(*clip.shape, *images.shape[1:])
