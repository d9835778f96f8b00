"""What should the dashboard of an RL run show? The demos' W&B pages, as code.

    page         project              shows
    workspace    rl-experiment        demo 3: sections `training` and `inference`, each on its own step axis
    workspace    rl-agent-extended    demo 4: a line per group and job type, of the runs tagged `demo4`; evaluation by
                                      the step of the checkpoint; the rollouts to read
    Report       rl-agent             demo 2: `e2e/speed` and `e2e/latency_ms` next to those of `inference-only`

Run the demos online first. `--experiment` keeps to one experiment, on pages of its own. Saving replaces what was saved
under the same name, edits made in the app included. `--print` shows the pages as JSON: no account, nothing saved.

    uv run --group dashboard python dashboard.py --entity my-team --experiment my-fourth
"""

import contextlib
import hashlib
import json
import re
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import common
from backbone import wandb_internals
from demo4_extensions import EvaluationPipelineActor

import numpy as np

try:
    import wandb
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ModuleNotFoundError as missing:
    sys.exit(f"dashboard.py: {missing}; start it with `uv run --group dashboard python dashboard.py`")

# The panels that come first, by metric, path or pattern; a section shows six at a time. The rest follows as logged.
TRAINING = ("loss", "kl", "entropy", "grads", "e2e/speed", "time/wait_for_batch_s", "off_policy", "e2e/latency_ms")
TRAINING += ("explained_variance", "value_loss")
INFERENCE = ("reward/mean", "reward/*/mean", "success_rate", "groups", "e2e/speed", "time/wait_for_policy_s")
INFERENCE += ("response_length", "e2e/latency_ms", "staleness", "reward")
EVALUATION = ("*/accuracy", "*/pass@4")
# What the reward has cost, beside its panel over the steps. An axis must be in the rows of what is drawn over it.
SPENT = "tokens_total"
# Noise hides the trend of these; the others are read for spikes, dips and steps, which smoothing would flatten.
NOISY = ("loss", "entropy", "explained_variance", "value_loss", "reward/mean", "success_rate", "truncated_fraction")
NOISY += ("reward/*/mean", "groups")
SMOOTH = dict(smoothing_type="exponentialTimeWeighted", smoothing_factor=0.6, smoothing_show_original=True)


def logged(pipeline: Any, generate: Callable) -> list[str]:
    """The keys of numbers in a pipeline's rows, without prefix: of a report that is reduced as its actor does it."""
    row = common.reduce_reports([generate(0, np.random.default_rng(0))], pipeline.reduction, who=["worker"])
    numbers = [key for key, value in row.items() if not isinstance(value, str)]
    return [*numbers, *(f"{key}_total" for key in pipeline.reduction.totals)]


def panels(
    keys: Sequence[str], first: Sequence[str] = (), prefix: str = "", axis: str = "step"
) -> Iterator[wr.LinePlot]:
    """Each key but the axis on one panel, together with the others of its path or pattern."""
    left = [key for key in keys if key != axis]
    for path in (*first, *(key.rpartition("/")[0] or key for key in keys)):
        if mine := [key for key in left if fnmatchcase(key, path) or key.rpartition("/")[0] == path]:
            left = [key for key in left if key not in mine]
            yield panel(path if len(mine) > 1 else mine[0], mine, prefix, axis, path in NOISY)


def panel(title: str, keys: Sequence[str], prefix: str, axis: str, is_noisy: bool) -> wr.LinePlot:
    plot = wr.LinePlot(title=title, **SMOOTH if is_noisy else {})
    plot.x, plot.y = prefix + axis, [prefix + key for key in keys]
    plot.layout.w = 12  # half of a Report
    return plot


def section(
    name: str, keys: Sequence[str], first: Sequence[str] = (), prefix: str = "", axis: str = "step"
) -> ws.Section:
    settings = ws.SectionPanelSettings(x_axis=prefix + axis)  # for panels that are added in the app
    made = list(panels(keys, first, prefix, axis))
    if "reward/mean" in keys:
        made.insert(1, panel(f"reward/mean over {SPENT}", ["reward/mean"], prefix, SPENT, is_noisy=True))
    return ws.Section(name=name, panels=made, is_open=True, panel_settings=settings)


def pages(entity: str, experiment: str = "") -> tuple[ws.Workspace, ws.Workspace, wr.Report]:
    training = logged(common.TrainingPipelineActor, common.generate_training_metrics)
    inference = logged(common.InferencePipelineActor, common.generate_inference_metrics)
    evaluation = logged(EvaluationPipelineActor, common.generate_evaluation_metrics)
    both = [key for key in training if key in inference]
    only = [ws.Config("experiment") == experiment] if experiment else []
    of = f" of {experiment}" if experiment else ""

    paths = ws.Workspace(entity, "rl-experiment", f"Training and inference{of}")
    paths.sections = [section("training", training, TRAINING, "training/")]
    paths.sections += [section("inference", inference, INFERENCE, "inference/")]
    paths.runset_settings.filters = ws.And(*only)

    groups = ws.Workspace(entity, "rl-agent-extended", f"Experiments by group{of}")
    groups.sections = [section("training and inference", both, ("e2e/speed",))]
    groups.sections += [section("training", [key for key in training if key not in both], TRAINING)]
    groups.sections += [section("inference", [key for key in inference if key not in both], INFERENCE)]
    groups.sections += [section("evaluation", evaluation, EVALUATION, axis="checkpoint_step")]
    rollouts = wr.WeavePanelSummaryTable(table_name="rollouts_table")
    groups.sections += [ws.Section(name="rollouts", panels=[rollouts], is_open=True)]
    jobs = ws.Metric("JobType").isin(["training", "inference", "evaluation"])
    groups.runset_settings.filters = ws.And(jobs, ws.Tags().isin(["demo4"]), *only)
    # By job type as well, or a line of what both pipelines log would be the mean of two different things.
    groups.runset_settings.groupby = [ws.Metric("Group"), ws.Metric("JobType")]

    report = wr.Report("rl-agent", entity, f"Speed and latency across projects{of}", width="fluid")
    projects = {"training": "rl-agent", "inference": "inference-only"}
    runsets = [wr.Runset(entity, project, name, filters=ws.And(*only)) for name, project in projects.items()]
    report.blocks = [wr.PanelGrid(runsets=runsets, panels=[panel for key in both for panel in panels([key])])]
    return paths, groups, report


def save(paths: ws.Workspace, groups: ws.Workspace, report: wr.Report) -> Iterator[str]:
    """Saves the pages and yields their URLs; saves none if a project is missing."""
    api, found = wandb.Api({"entity": report.entity}, timeout=10), set()
    with contextlib.suppress(ValueError):  # no such entity
        found = {project.name for project in api.projects(report.entity)}
    needed = {paths.project, groups.project, *(runset.project for runset in report.blocks[0].runsets)}
    if missing := sorted(needed - found):  # the library would make an empty one
        raise ValueError(f"{report.entity} has no project {', '.join(missing)}: run the demos with --mode online first")
    for page in (paths, groups):
        # A view is found by the end of its URL alone, which is random by default.
        slug = hashlib.sha256(f"{page.entity}/{page.project}/{page.name}".encode()).hexdigest()[:11]
        page._internal_name = f"nw-{slug}-v"
        with contextlib.suppress(ValueError):  # not saved yet
            page._internal_id = ws.internal.get_view_dict(page.entity, page.project, slug)["id"]
        yield page.save().url
    with contextlib.suppress(ValueError):  # a server that lists no reports
        saved = api.reports(f"{report.entity}/{report.project}")
        report.id = next((old.id for old in saved if old.display_name == report.title), "")
    yield report.save().url


def as_json(page: Any) -> dict[str, Any]:
    return {"type": type(page).__name__} | {k: v for k, v in vars(page).items() if k[0] != "_" and v is not None}


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--entity", default="", help="W&B user or team to save for")
    parser.add_argument("--experiment", default="", metavar="ID", help="(all)")
    parser.add_argument("--print", action="store_true", help="print the pages as JSON instead")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]{0,60}", args.experiment, re.ASCII):  # it becomes part of an expression
        parser.error("--experiment must be up to 60 letters, digits, '.', '_' or '-'")
    made = pages(args.entity, args.experiment)
    if args.print:
        return print(json.dumps(made, default=as_json, indent=2))
    if not args.entity:
        parser.error("saving needs --entity (or use --print)")
    try:
        wandb.setup(wandb.Settings(silent=True, x_graphql_retry_max=2))  # by default it would try for hours
        # Asked here, because the library would prompt for a key.
        if not wandb_internals.has_login(keep=True):
            parser.error("saving needs an API key: run `wandb login`, set WANDB_API_KEY or use --print")
    except ValueError as error:  # a key or a WANDB_ variable that can't be right
        parser.error(" ".join(str(error).split()))
    try:
        for url in save(*made):
            print(url, flush=True)
    except Exception as error:  # wandb's, pydantic's, and the library raises plain ones as well
        sys.exit(f"dashboard.py: {' '.join(str(error).split()) or repr(error)}")


if __name__ == "__main__":
    main()
