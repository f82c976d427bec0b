"""Which training signal lets the first gates stop what the last ones would? Variants of the gates' loss, no new labels.

    python benchmarks/early_gates.py --data DIR --weights FILE --light FILE --features FOLDER
    python benchmarks/early_gates.py --report

The folds, videos, networks and features are those of `benchmarks/sparse.py`. A run trains gates on a frozen ResNet-50
with one variant of the loss, half a minute on a CPU; the variants of a fold share everything else. The table compares
each with the thesis' loss, video by video. A run writes a file to `benchmarks/results/early_gates`, or to --out.
Variants:

    thesis          alpha L_cls + (1 - alpha) L_eff + beta L_inner + (1 - beta) L_self
    all inner       L_inner on all frames, not on forwarded ones
    executed        in place of L_eff what is executed: a gate's decision counts with what later gates make of it
    worth           in place of L_self: each gate tells whether the head names the label from this frame in the end; a
                    frame stopped wrongly costs 1, one forwarded wrongly the share of the cost that is left behind it
    worth+          worth, all inner and executed together
    imitation       as worth, but a gate tells whether gates trained by the thesis' loss use the frame
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import sparse
import torch
from compose_untrimmed import Composed
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import DynskipError, FixedGate, FLOPsLookup, SkipOutput, SoFLoss, StopOrForward, WorthLoss
from dynskip.losses import budget_loss, inner_classification_loss, worth_loss
from dynskip.rules import margins
from dynskip.video import command

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "early_gates"
BUDGETS = (0.6, 0.4, 0.2)


class AllInner(nn.Module):
    """The inner classifiers' loss on all frames, not on those that were forwarded."""

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        assert output.inner_logits is not None
        everywhere = torch.ones_like(output.forward)
        return inner_classification_loss(output.inner_logits, everywhere, targets, output.activation)


class Executed(nn.Module):
    """The mean cost that is executed, as a share of a whole frame's: `sum_n c_n prod_{m<n} g_m`."""

    def __init__(self, lookup: FLOPsLookup) -> None:
        super().__init__()
        self.costs, self.head = (lookup.per_stage + lookup.gates) / lookup.total, lookup.head / lookup.total

    def forward(self, output: SkipOutput) -> Tensor:
        return budget_loss(output.forward, self.costs, self.head, 0.0)


def loss_of(variant: str, teacher: StopOrForward | None, lookup: FLOPsLookup) -> sparse.Loss:
    """Return the loss of encoded videos, their output and targets."""
    with_worth = variant in ("worth", "worth+", "imitation")
    # Worth takes the place of self-supervision, but at full weight.
    criterion: Any = SoFLoss(lookup, sparse.ALPHA, 1.0 if with_worth else sparse.BETA, normalize=True)
    if variant in ("all inner", "worth+"):
        criterion.guidance.inner = AllInner()
    if variant in ("executed", "worth+"):
        criterion.efficiency = Executed(lookup)
    worth = WorthLoss(lookup)

    def loss(encoded: Any, output: SkipOutput, targets: Tensor) -> Tensor:
        total: Tensor = criterion(output, targets).total
        if not with_worth:
            return total
        if teacher is None:
            return total + worth(output, targets)  # type: ignore[no-any-return]
        with torch.no_grad():
            used = teacher.decide(encoded, sample=False).used.float()
        assert output.gate_logits is not None
        return total + worth_loss(margins(output.gate_logits), used, worth.saved)

    return loss


VARIANTS = ("thesis", "all inner", "executed", "worth", "worth+", "imitation")
NETWORKS = ("plain", "glance")


def perform(name: str, fold: int, seed: int, network: str, features: Any, items: Any, args: Any) -> None:
    """Train all variants on one kind of videos and one fold, and write a file for each."""
    kind = sparse.KINDS[name]
    files = {v: args.out / f"{name}-{network}-fold{fold}-seed{seed}-{v.replace(' ', '_')}.json" for v in args.variants}
    if all(file.exists() for file in files.values()):
        return
    part = sparse.composing(kind, fold, seed, features, items)
    parts = val, test = part("val"), part("test")
    plain, glanced, _ = sparse.networks(args, int(val.targets.max()) + 1)
    head: Any = plain.model.get_classifier()
    sparse.fit_head(head, features.embedding, [part("train", -version) for version in range(1, 9)], val)
    backbone = plain if network == "plain" else glanced
    whole = kind.plan.steps * FLOPsLookup.measure(plain, sparse.SIZE).dense
    every_frame = StopOrForward(plain, [FixedGate() for _ in plain.num_features]).eval()
    dense = sparse.gated(every_frame, parts, whole)[0]
    teacher: StopOrForward | None = None

    def train(variant: str, teacher: StopOrForward | None) -> StopOrForward:
        return sparse.train_gates(
            backbone, kind, part, seed, variant, functools.partial(loss_of, variant, teacher)
        ).train()

    for variant, file in files.items():
        started = time.perf_counter()
        if file.exists():
            continue
        if variant == "imitation" and teacher is None:
            teacher = train("thesis", None)
        model = train(variant, teacher if variant == "imitation" else None)
        if variant == "thesis":
            teacher = copy.copy(model)
        measured = copy.copy(model)
        content = {
            "run": {"kind": name, "network": network, "fold": fold, "seed": seed, "variant": variant},
            "machine": common.machine("cpu"),
            "seconds": round(time.perf_counter() - started),
            "clips": list(dict.fromkeys(test.clips)),
            "dense": dense,
            "stops": stops(model, test),
            "points": sparse.gated(measured.eval(), parts, whole),
        }
        model.train()
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")


@torch.no_grad()
def stops(model: StopOrForward, part: Composed) -> dict[str, list[float]]:
    """Tell where relevant and irrelevant frames end with the thresholds of training: shares of gates, then used."""
    model.eval()
    ends = torch.cat([model.decide(part.encoded(model, rows)).stopped_at for rows in part.batches()])
    named = {"relevant": part.relevant, "irrelevant": ~part.relevant}
    return {
        name: (ends[own].bincount(minlength=model.backbone.num_stages + 1) / own.sum()).tolist()
        for name, own in named.items()
    }


def report(folder: Path) -> str:
    """Compare the variants: accuracy and cost as trained, and with thresholds chosen on the validation parts."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    blocks = []
    for kind, network in sorted({(each["run"]["kind"], each["run"]["network"]) for each in found}):
        own = [each for each in found if (each["run"]["kind"], each["run"]["network"]) == (kind, network)]
        copies = sparse.KINDS[kind].copies["test"]
        by_run = {tuple(each["run"].values()): each for each in own}
        ways = {"as trained": functools.partial(sparse.choose, how="trained", budget=1.0)}
        for budget in BUDGETS:
            ways[f"within {budget:.0%}"] = functools.partial(sparse.choose, how="chosen", budget=budget)
            ways[f"ending early, within {budget:.0%}"] = functools.partial(sparse.choose, how="early", budget=budget)
        lines = [
            "| | variant | runs | top-1 % | cost % | less dense | less thesis |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for (way, choose), variant in itertools.product(ways.items(), VARIANTS):
            runs = [each for each in own if each["run"]["variant"] == variant and choose(each["points"])]
            pairs = [(each, by_run.get((*list(each["run"].values())[:4], "thesis"))) for each in runs]
            if not runs:
                continue
            mine = [choose(each["points"]) for each in runs]
            clips = [[clip for clip in each["clips"] for _ in range(copies)] for each in runs]
            cells = [differ(mine, [each["dense"] for each in runs], clips)]
            theirs = [other and choose(other["points"]) for _, other in pairs]
            cells.append(differ(mine, theirs, clips) if all(theirs) else "")
            top1, cost = sparse.average(mine)
            lines.append(
                f"| {way} | {variant} | {len(runs)} | {100 * top1:.1f} | {100 * cost:.1f} | {' | '.join(cells)} |"
            )
        blocks += [f"### {kind}, {network}", "\n".join(lines), stopped(own)]
    return "\n\n".join(blocks)


def differ(ones: Sequence[Any], others: Sequence[Any], clips: Sequence[Sequence[str]]) -> str:
    """Compare video by video, with the standard error clustered by clip."""
    mine, theirs = ([hit for each in side for hit in sparse.hits(each)] for side in (ones, others))
    mean, error = common.paired(mine, theirs, itertools.chain(*clips))
    return f"{100 * mean:+.1f} ± {100 * error:.1f}"


def stopped(found: Sequence[dict[str, Any]]) -> str:
    """Tell where frames end as trained."""
    lines = []
    for variant, name in itertools.product(VARIANTS, ("relevant", "irrelevant")):
        own = [each["stops"][name] for each in found if each["run"]["variant"] == variant]
        if own:
            shares = (100 * statistics.mean(column) for column in zip(*own, strict=True))
            lines.append(f"| {variant} | {name} | {' | '.join(f'{share:.1f}' for share in shares)} |")
    width = lines[0].count("|") - 4
    gates = " | ".join(f"gate {n + 1}" for n in range(width))
    return "\n".join([f"| stopped at, % | frames | {gates} | used |", "|---|---|" + "---:|" * (width + 1), *lines])


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    if args.report:
        print(report(args.out))
        return 0
    if None in (args.data, args.weights, args.light, args.features):
        raise DynskipError("Runs need --data, --weights, --light and --features; --report prints what is there.")
    args.out.mkdir(parents=True, exist_ok=True)
    features, items = sparse.encode(args)
    runs = list(itertools.product(args.kinds, args.folds, args.seeds, args.networks))
    for kind, fold, seed, network in tqdm(runs, "runs", disable=None):
        perform(kind, fold, seed, network, features, items, args)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name in ("data", "weights", "light", "features"):
        add(f"--{name}", type=Path, help="as in sparse.py")
    add(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="RESULTS",
        help="where results go; what is there stays",
    )
    add("--kinds", nargs="+", choices=sparse.KINDS, default=["half"], help="(default: half)")
    add("--networks", nargs="+", choices=NETWORKS, default=["plain"], help="without a glance, or with one")
    add("--folds", nargs="+", type=int, default=list(range(sparse.FOLDS)), help="(default: all five)")
    add("--seeds", nargs="+", type=int, default=[0], help="(default: 0)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    add("--report", action="store_true", help="print the tables of results")
    args = parser.parse_args(arguments)
    return command.run(lambda: run(args), "Finished runs stay; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
