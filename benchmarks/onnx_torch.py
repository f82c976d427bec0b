"""How fast is the ONNX runner, against torch with the same stages and gates?

    python benchmarks/onnx_torch.py --json onnx_torch.json

Both have as many threads. torch is timed as it is and (unless `--eager`) optimised.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch

import dynskip_onnx


def online(runner: dynskip_onnx.Runner, video: dynskip_onnx.Array) -> list[int]:
    """Run a video frame by frame until it ends; return `stopped_at` of each frame."""
    session, stopped_at = runner.stream(), []
    for frame in video:
        step = session(frame[None])
        stopped_at.append(int(step.stopped_at[0]))
        if step.ended[0]:
            break
    return stopped_at


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--eager", action="store_true", help="leave out the optimised model, which is compiled")
    args = parser.parse_args(argv)
    report = common.Report(__doc__, args)
    model, video = common.build(args, args.size)
    provider = "CUDAExecutionProvider" if args.device == "cuda" else "CPUExecutionProvider"
    with tempfile.TemporaryDirectory() as name:
        folder = model.export(f"{name}/model", args.size)
        runner = dynskip_onnx.load(folder, threads=torch.get_num_threads(), providers=[provider])
    frames = video[0].cpu().numpy()
    decisions = online(runner, frames)
    if not decisions == runner.clip(frames).stopped_at.tolist()[: len(decisions)] == common.online(model, video):
        raise RuntimeError(f"The runner does not follow the schedule: {decisions}.")
    functions: dict[str, Callable[[], Any]] = {
        "clip, torch": lambda: model(video),
        "clip, onnxruntime": lambda: runner.clip(frames),
        "online, torch": lambda: common.online(model, video),
        "online, onnxruntime": lambda: online(runner, frames),
    }
    if not args.eager:
        fast, fast_video = common.optimised(model, video)
        functions["clip, torch optimised"] = lambda: fast(fast_video)
        functions["online, torch optimised"] = lambda: common.online(fast, fast_video)
    gmacs = common.check(model, video)
    for name, times in common.interleaved(functions, 3 if args.quick else 20, args.device).items():
        report.add(name, times, gmacs)
    for way in ("online", "clip"):
        if not args.eager:
            report.compare(f"{way}, onnxruntime", f"{way}, torch optimised")
        report.compare(f"{way}, onnxruntime", f"{way}, torch")
    report.finish()


if __name__ == "__main__":
    main()
