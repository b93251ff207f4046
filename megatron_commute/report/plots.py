"""Pictures of a run from its decision log alone: `report` for one HTML file, `export` for PNG, SVG
and CSV.

The same record gives the same bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib

from megatron_commute.record import log as record
from megatron_commute.report import (
    design,
    picture_criterion,
    picture_design,
    picture_flow,
    picture_run,
    series,
    thinning,
)
from megatron_commute.report.drawing import house_style
from megatron_commute.report.page import page
from megatron_commute.report.series import summary_rows
from megatron_commute.report.tables import tables
from megatron_commute.settings import text_files

__all__ = ["closing", "designed", "export", "pictures", "planned", "replayed", "report", "summary_rows"]


def report(run, out=None):
    """Write the report of a run as one self-contained HTML file and return its path.

    run: a record, or the folder that holds one. out: the file to write, by default report.html
    beside the record. Raises FileNotFoundError where there is no record, ValueError where it is
    damaged or has no start.
    """
    file = record.find(run)
    out = pathlib.Path(out) if out else file.with_name("report.html")
    events = shortened(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    text_files.replace(out, page(events, pictures(events)))
    return out


def shortened(file):
    """The series.Run of a record, long ones thinned to what a page can show."""
    torn = []
    lines = (line for line in record.checked(file) if line is not None or torn.append(True))
    kept, totals = thinning.thinned(lines)
    return dataclasses.replace(series.by_event(kept, file), totals=totals, torn=bool(torn))


def _whole(run):
    return series.by_event([line for line in record.checked(run) if line is not None], run)


def export(run, out_dir):
    """Write every picture as PNG and SVG and every series as CSV into out_dir; return the paths
    written.

    run: a record, or the folder that holds one; errors as in `report`.
    """
    events, shown = _whole(run), shortened(record.find(run))
    folder = pathlib.Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in pictures(shown):
        paths += [folder / f"{picture.name}.svg", folder / f"{picture.name}.png"]
        text_files.replace(paths[-2], picture.svg())
        text_files.replace(paths[-1], picture.png())
    for name, (headers, rows) in tables(events).items():
        paths.append(folder / f"{name}.csv")
        with text_files.replacing(paths[-1]) as file:
            csv.writer(file).writerows([headers, *rows])
    return paths


def planned(start, out_dir, with_page=False):
    """Draw law flow's plan in the fields of a start line as flow.png in `out_dir`, with_page:
    report.html beside it, too; return the paths written.
    """
    run = series.by_event([record.line("start", {**start, "sample": 0})])
    folder = pathlib.Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with house_style():
        picture = picture_flow.planned(run)
    paths = [folder / "flow.png"]
    if with_page:
        paths.append(folder / "report.html")
        text_files.replace(paths[-1], design.page(run, picture))
    text_files.replace(paths[0], picture.png())
    return paths


def closing(run_dir):
    """Write the report of a run that is over and return its closing table as text."""
    from tabulate import tabulate

    found = shortened(record.find(run_dir))
    headers, rows = summary_rows(found)
    timing = (found.end or found.losses[-1])["timing"]
    spent, total = timing["probe_seconds"], timing["seconds"]
    share = f"{spent / max(total - spent, 1e-9):.1%} on top of training"
    cost = f"probes took {spent:.0f} s of {total:.0f} s, {share}"
    return f"{tabulate(rows, headers, floatfmt='.4g')}\n{cost}\nreport: {report(run_dir)}"


def designed(path):
    """Draw the record of a design, PATH/design.jsonl, as report.html beside it; return its path."""
    events = {}
    for each in record.read(pathlib.Path(path) / "design.jsonl"):
        events.setdefault(each["event"], []).append(each)
    with house_style():
        drawn = picture_design.pictures(events)
    out = pathlib.Path(path) / "report.html"
    text_files.replace(out, design.proven(events, drawn))
    return out


def pictures(run):
    """Every Picture a series.Run has numbers for, in the order of the report."""
    with house_style():
        drawn = [picture_flow.planned(run), picture_run.weights(run), picture_run.budgets(run)]
        drawn += [picture_run.losses(run), picture_run.overhead(run)]
        drawn += [*picture_criterion.scores(run), *picture_criterion.brackets(run)]
    return [picture for picture in drawn if picture is not None]


def replayed(run, found, out):
    """Draw a replay.Told beside what happened and write it to `out` (.png or .svg). run: a record
    or its folder.
    """
    events, out = _whole(run), pathlib.Path(out)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {out}: write a name that ends in .png or .svg")
    with house_style():
        picture = picture_run.replayed(events, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    text_files.replace(out, picture.svg() if out.suffix == ".svg" else picture.png())
    return out
