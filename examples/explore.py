"""A page in the browser: what gates do with a video of yours, and what becomes of it at other thresholds.

    python examples/explore.py runs/mine/model --videos DIR
    python examples/explore.py runs/mine/model --data DIR    # labelled videos: accuracy against cost, too
    python examples/explore.py resnet50                      # a timm model, with gates that need no training

MODEL is a folder that `save_pretrained` or a training recipe wrote, or a timm model's name. The page is served to this
machine alone, and loads nothing from elsewhere. An uploaded file is deleted as soon as its frames are decoded.
"""

from __future__ import annotations

import argparse
import base64
import copy
import functools
import html
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import torch
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from dynskip import DynskipError, SkipOutput, StopOrForward, calibrate, evaluation, metrics, plot, video
from dynskip.activation import named_classes
from dynskip.video import command
from dynskip.video.files import VIDEO_SUFFIXES
from dynskip.video.seen import SeenVideo
from dynskip.video.similar import similarity_model

HERE_ALONE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
STYLE = """<style>
.prose img { max-width: min(100%, 640px) } .prose .strip { overflow-x: auto }
.prose .strip img { max-width: none; min-width: 720px; width: 100% } .prose .costs { width: 100% }
.prose .costs :is(th, td) { border: 0; padding: 4px 6px; text-align: right; overflow-wrap: anywhere }
.prose .costs tr > :first-child { text-align: left }
</style>"""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("models", metavar="MODEL", nargs="+", help="folder of a saved model, or the name of a timm model")
    add("--videos", type=Path, metavar="DIR", help="folder with videos to choose from")
    add("--data", type=Path, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--weights", default="hub", help="of timm models: 'hub' downloads timm's (default), or a FILE")
    add("--frames", type=int, default=16, help="frames of a video, for timm models (default: 16)")
    add("--max-mb", type=int, default=200, help="largest file that may be uploaded (default: 200)")
    add("--max-frames", type=int, default=20_000, help="longest file that may be uploaded (default: 20000 frames)")
    add("--port", type=int, default=7860, help="the page is http://127.0.0.1:PORT (default: 7860)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    return top


class Explorer:
    """What the page does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.items = video.load_items(args.data) if args.data else []
        found = [item.path for item in self.items] + (video.find_videos(args.videos)[0] if args.videos else [])
        self.videos = list(map(str, found))
        self.load, self.curves = functools.lru_cache(4)(self._load), functools.lru_cache(4)(self._curves)

    def _load(self, name: str) -> StopOrForward:
        if "/" in name or Path(name).is_dir():
            return StopOrForward.from_pretrained(name).to(self.args.device)
        return similarity_model(name, self.args.weights, frames=self.args.frames).to(self.args.device)

    def _curves(self, name: str) -> tuple[Any, dict[str, Sequence[calibrate.CurvePoint]]]:
        model = copy.deepcopy(self.load(name))  # the search tries thresholds
        clips = video.Clips.of(model, video.pick_split(self.items, video.held_out_split(self.items) or "train"))
        encoded = calibrate.encode(model, video.EvaluationLoader(clips, 8, device=self.args.device))
        return encoded, evaluation.curves(model, encoded, metric=metric_of(model)[0])

    def look(self, name: str, path: str | None, upload: str | None, dark: bool) -> list[Any]:
        """Show a chosen or uploaded video; an upload is deleted."""
        file, nothing = upload or path, [None, "", None, ""]
        if not name or not file:
            return [None, "<p>Choose a model and a video.</p>", *nothing]
        try:
            source, most = video.open_source(Path(file)), self.args.max_frames
            if upload and len(source) > most:
                raise DynskipError(f"{file} has {len(source)} frames; up to {most} can be uploaded. Cut a part of it.")
            seen = SeenVideo(self.load(name), source)
            seen.measure()
        except Exception as error:
            if (message := command.explain(error, "Choose a smaller model.")) is None:
                raise
            return [None, problem(message.replace(file, Path(file).name)), *nothing]
        finally:
            if upload:
                Path(upload).unlink(missing_ok=True)
        return [seen, f"<h2>{html.escape(Path(file).name)}</h2>", None, *self.show(seen, dark)]

    def show(self, seen: SeenVideo, dark: bool) -> tuple[str, pd.DataFrame, str]:
        """Decide on the stored features, and draw filmstrip, running prediction and costs."""
        output, stages = seen.decide(), seen.model.backbone.stage_names
        stopped_at, fallback = output.stopped_at[0].cpu(), int(output.fallback_frame[0])
        figure = plot.timeline(seen.pictures, stopped_at, stages, fallback_frame=fallback, dark=dark)
        strip = image(figure, plot.timeline_text(stopped_at, stages, fallback_frame=fallback))
        return f'<div class="strip">{strip}</div>', running(seen, output), costs(seen, output)

    def decide(self, seen: SeenVideo, dark: bool, *values: float) -> tuple[str, pd.DataFrame, str]:
        """Decide again with the sliders' values; without any, run the network at the present ones and time it."""
        seen.turn(values) if values else seen.measure()
        return self.show(seen, dark)

    @torch.no_grad()
    def draw_curve(self, seen: SeenVideo | None, dark: bool, name: str) -> str:
        """Draw accuracy against cost on the labelled videos, with the point that the sliders set."""
        if seen is None or not self.items:
            return ""
        try:
            encoded, curves = self.curves(name)
        except DynskipError as error:
            return problem(f"No curve: {error}")
        metric, named = metric_of(seen.model)
        outputs = [seen.model.decide(videos) for videos, _ in encoded]
        answers, macs = (torch.cat([getattr(x, key) for x in outputs]).cpu() for key in ("probabilities", "macs"))
        accuracy = float(metric(answers, torch.cat([targets for _, targets in encoded])))
        point = calibrate.CurvePoint(accuracy, float(macs.mean()))
        said = f"{named} {accuracy:.1%} at {point.macs / 1e9:.3g} GMACs a video, on {len(macs)} labelled videos."
        return f"{image(plot.accuracy_compute(curves, point, metric=named, dark=dark), said)}<p>Now: {said}</p>"


def metric_of(model: StopOrForward) -> tuple[calibrate.Metric, str]:
    several = model.activation == "sigmoid"
    return (metrics.mean_average_precision, "mAP") if several else (metrics.top_k_accuracy, "top-1")


def image(figure: Any, said: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return f'<img alt="{html.escape(said)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def problem(message: str) -> str:
    return f'<p role="alert">{html.escape(message)}</p>'


def name_of(model: StopOrForward, index: int) -> str:
    return model.class_names[index] if model.class_names else f"class {index}"


def running(seen: SeenVideo, output: SkipOutput) -> pd.DataFrame:
    """List the probabilities of the three most probable classes after each frame that was looked at."""
    after = seen.running(output)
    top = after[-1].topk(min(3, after.shape[1])).indices.tolist()
    table = pd.DataFrame({"frame": range(1, len(after) + 1)} | {name_of(seen.model, n): after[:, n] for n in top})
    melted: pd.DataFrame = table.fillna(0).melt("frame", var_name="class", value_name="probability")
    return melted


def costs(seen: SeenVideo, output: SkipOutput) -> str:
    """Compare answer and costs with the dense network's."""
    both, head = (seen.dense, output), "<tr><th></th><th>dense</th><th>gates</th><th>of dense</th></tr>"
    lines = f"{head}<tr><td>answer</td>"
    for each in both:
        named = named_classes(each.probabilities[0], each.activation).items()
        said = ", ".join(f"{name_of(seen.model, n)} {p:.1%}" for n, p in named)
        lines += f"<td>{html.escape(said or 'no class')}</td>"
    whole, part = map(seen.loaded, both)
    rows: list[tuple[str, float, float | None]] = [
        ("GMACs", float(seen.dense.macs[0]) / 1e9, float(output.macs[0]) / 1e9),
        ("network, ms", seen.dense_ms, seen.gates_ms),
        ("frames decoded", whole.decoded, part.decoded),
        ("decoding, ms", whole.milliseconds, part.milliseconds),
    ]
    for name, before, now in rows:
        told = f"{now:.4g}</td><td>{now / before:.0%}" if now is not None else "not measured</td><td>"
        lines += f"<tr><td>{name}</td><td>{before:.4g}</td><td>{told}</td></tr>"
    used, looked = int(output.used.sum()), int(output.seen.sum())
    said = f"Frames: {used} used, {looked - used} stopped, {len(seen.pictures) - looked} unseen. "
    if output.fallback[0]:
        said += f"No frame passed every gate: frame {int(output.fallback_frame[0])} was run to the end instead. "
    return f'<p>{html.escape(said + "; ".join(seen.notes))}</p><table class="costs">{lines}</table>'


async def here_alone(request: Any, serve_it: Any) -> Any:
    """Tell the browser to load nothing from other machines."""
    response = await serve_it(request)
    response.headers["content-security-policy"] = HERE_ALONE
    return response


def build(args: argparse.Namespace) -> gr.Blocks:
    """Lay out the page."""
    own, quiet = Explorer(args), {"show_progress": "hidden"}
    with gr.Blocks(title="dynskip", analytics_enabled=False, delete_cache=(600, 600)) as page:
        shown, dark = gr.State(), gr.Checkbox(visible=False)
        gr.HTML(f"{STYLE}<h1>What gates do with a video</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                model = gr.Dropdown(args.models, value=args.models[0], label="Model", allow_custom_value=True)
                choice = gr.Dropdown(own.videos, value=None, label="Video", visible=bool(own.videos))
                upload = gr.File(label=f"Upload a video (at most {args.max_mb} MB)", file_types=list(VIDEO_SUFFIXES))
                side = gr.Column()
            with gr.Column(scale=3, min_width=300):
                told, strip, table = gr.HTML(), gr.HTML(), gr.HTML()
                line = gr.LinePlot(x="frame", y="probability", color="class", y_lim=[0, 1], title="Running prediction")
                curve = gr.HTML()
        results, drawn = [strip, line, table], [shown, dark, model]

        def dials(seen: SeenVideo | None) -> None:
            if seen is None:
                return
            found = seen.dials()
            made = [gr.Slider(x.lowest, x.highest, x.value, step=x.step, label=x.says, interactive=True) for x in found]
            for slider in made:
                event = slider.input(own.decide, [shown, dark, *made], results, trigger_mode="always_last", **quiet)
                event.then(own.draw_curve, drawn, curve, **quiet)
            gr.Button("Measure the time at these settings").click(own.decide, [shown, dark], results)

        with side:
            gr.render(inputs=[shown])(dials)
        for event in (model.input, choice.input, upload.upload):
            clear = event(lambda: None, None, line)  # a line plot keeps the colours of the classes it has shown
            ready = clear.then(own.look, [model, choice, upload, dark], [shown, told, upload, *results])
            ready.then(own.draw_curve, drawn, curve)
        page.load(None, None, dark, js="() => document.body.classList.contains('dark')")
    return page


def serve(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C; what is uploaded lies in a folder that goes away with this process."""
    with tempfile.TemporaryDirectory(prefix="dynskip-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        only = {"middleware": [Middleware(BaseHTTPMiddleware, dispatch=here_alone)]}
        size = f"{args.max_mb}mb"
        build(args).launch(server_name="127.0.0.1", server_port=args.port, max_file_size=size, app_kwargs=only)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)
    return command.run(lambda: serve(args), "The page is closed.", "Choose a smaller model.")


if __name__ == "__main__":
    sys.exit(main())
