"""The page of a schedule that was planned before a run: what it does to every domain, and how to
use it.
"""

from __future__ import annotations

import numpy as np

from megatron_commute.report.markup import document, figure, listed, named, section, table, text, unbroken

USE = (
    "Train with mode: fixed and controller: {law: flow} in the mixture file; or with mode: fixed and "
    "schedule: schedule.csv, which is this schedule, whatever the learning rates of that run."
)

PROVEN_USE = (
    "Train with mode: fixed and schedule: schedule.csv in the mixture file. It was proven on a small proxy "
    "with the learning rates of this run; nobody knows how much of the gain a larger model keeps."
)
VERDICTS = {
    "gain": "The schedule lowers the target's final loss on fresh seeds of the proxy.",
    "nothing": "Nothing to gain here: the target's interval holds zero. No schedule was written.",
    "harm": "Nothing to gain within the harm allowed: every strength that was proven took more from one.",
    "short": "The proxy is too short to decide: give it more steps, or plan by law flow alone.",
}
NO_STEP = "No step along either road helps the target on the proxy, so nothing was proven."
OPTIMAL = (
    "At the best order the influence of a sample is the same for every domain and step, but for what its "
    "budget and the step ask; what is left over at the constant mixture is the way to go."
)


def page(run, picture):
    """HTML text. run: series.Run of a start line with law flow's plan; picture: of picture_flow."""
    title = f"Planned order of data: {', '.join(run.names)}"
    headers, told = rows(run.names, run.flow, run.start["samples"])
    notes = "".join(f"<p>Note: {text(note)}</p>\n" for note in run.start["warnings"])
    body = [
        f"<header>\n<h1>{text(title)}</h1>\n{listed(_facts(run))}\n{notes}</header>\n",
        section("Schedule", f'<div class="pictures">{figure(picture)}</div>'),
        section("Domains", table(headers, [[named(row[0]), *map(text, row[1:])] for row in told], "domains")),
        section("How to use it", f"<p>{text(USE)}</p>"),
    ]
    return document(title, body)


def _facts(run):
    start, flow = run.start, run.flow
    target = ", ".join(f"{name} {share:.3g}" for name, share in zip(run.names, flow["target"], strict=True))
    return {
        "law": f"flow, strength {flow['strength']:g}",
        "steps": f"{start['train_iters']:,}",
        "samples": f"{start['samples']:,}",
        "global batch": f"{start['global_batch']:,} samples",
        "target": target,
        "memory": f"{flow['memory']:g}",
        "first steps at shares": f"{flow['kept']:,}",
        "peak learning rate": f"{flow['scale']['peak']:g}",
    }


def rows(names, flow, samples):
    """Headers and rows of text: shares, bounds that the weights reach, and when half of a domain's
    samples are used.

    flow: of a start line; samples: of the run.
    """
    headers = [
        "domain",
        "samples",
        "share",
        "target",
        "range",
        "least weight",
        "greatest weight",
        "half used at",
    ]
    edges = np.append(flow["segments"]["sample"], samples)
    weights, found = np.array(flow["segments"]["weights"]), []
    used = np.vstack([np.zeros(len(names)), np.cumsum(weights * np.diff(edges)[:, None], axis=0)])
    for k, name in enumerate(names):
        total = used[-1, k]
        half = f"{np.interp(total / 2, used[:, k], edges) / samples:.0%} of the run" if total else "-"
        cells = [name, f"{total:,.0f}", f"{total / samples:.3g}", f"{flow['target'][k]:.3g}"]
        cells += [f"{flow['ranges'][k]:+.3g}".replace("-", "−")]
        found.append([*cells, f"{weights[:, k].min():.3g}", f"{weights[:, k].max():.3g}", half])
    return headers, found


def proven(events, drawn):
    """HTML text of a design on proxies. events: {event: [lines]} of its record; drawn: pictures."""
    asked, outcome = events["design"][0], events["outcome"][-1]
    title = f"Designed order of data: {', '.join(asked['names'])}"
    pictures = "".join(figure(picture) for picture in drawn)
    body = [
        f"<header>\n<h1>{text(title)}</h1>\n<p>{text(VERDICTS[outcome['outcome']])}</p>\n"
        f"{listed(_proxy_facts(asked))}\n</header>\n",
        section("Pictures", f'<div class="pictures">{pictures}</div>'),
        section("Proof", _proof_table(events)),
        section("What else would do the same", _equals(events, asked)),
        section("One percent more of a domain", _marginals(events, asked)),
        section("How far the constant mixture is from the best order", _optimality(events)),
        section("Cost", table(["part", "runs of the proxy", "minutes"], _cost_rows(asked), "cost")),
    ]
    if outcome["schedule"]:
        body.append(section("How to use it", f"<p>{text(PROVEN_USE)}</p>"))
    return document(title, body)


def _proxy_facts(asked):
    proxy = asked["proxy"]
    target = ", ".join(f"{n} {s:.3g}" for n, s in zip(asked["names"], asked["target"], strict=True) if s)
    return {
        "target": target,
        "steps of the run": f"{asked['train_iters']:,}",
        "proxy": f"{proxy['flavour']}, {proxy['parameters']:,} parameters",
        "its steps": f"{proxy['steps']:,} of {proxy['batch']} sequences of {proxy['sequence']} tokens",
        "its tokens a parameter": f"{proxy['tokens_a_parameter']:.1f}",
        "its vocabulary": f"{proxy['vocabulary']:,}" + (", rare tokens folded" if proxy["folded"] else ""),
        "harm allowed": f"{asked['harm']:.2%} of a domain's loss",
    }


def _proof_table(events):
    rows = []
    for proof in events.get("proof", []):
        look = proof["looks"][-1]
        for change in look["changes"]:
            moved = f"{change['change']:+.4f} ± {change['interval']:.4f}"
            part = f"{change['percent']:+.2f} ± {change['percent_interval']:.2f}"
            cells = [f"{proof['strength']:.3g}", f"{look['seeds']}", f"{change['constant']:.4f}", moved, part]
            rows.append([named(change["name"]), *map(unbroken, cells)])
    headers = ["loss", "strength", "pairs of seeds", "constant mixture (nats)", "change (nats)", "change (%)"]
    return table(headers, rows, "proof") if rows else f"<p>{text(NO_STEP)}</p>"


def _equals(events, asked):
    found = events.get("compared")
    if not found:
        return ""
    data, steps = found[-1]["data"], found[-1]["steps"]
    more = "more than was tried" if data is None else f"{data:.0%} more of the target's domains"
    longer = "unknown" if steps is None else f"{steps:.0%} more steps"
    by = f"by {found[-1]['seeds']} pairs of seeds and interpolation"
    return f"<p>{text(f'At the constant mixture the same gain takes {more}, or {longer}, {by}.')}</p>"


def _marginals(events, asked):
    found = events.get("influences")
    if not found:
        return ""
    rows = [["the target", found[0]["marginal_target"]]]
    rows += [[name, own] for name, own in zip(asked["losses"], found[0]["marginal"], strict=True)]
    cells = [
        [named(name), *(text(f"{1000 * value:+.2f}".replace("-", "−")) for value in own)]
        for name, own in rows
    ]
    headers = ["change of the loss of (mnats)", *(f"1 % more {name}" for name in asked["names"])]
    return table(headers, cells, "marginal")


def _optimality(events):
    rows = []
    for entry in events.get("road", []):
        road = entry["road"]
        memory = "-" if road["memory"] is None else f"{road['memory']:.3g}"
        name = "flow, fitted" if road["name"] == "flow" else "free segments"
        kept = [f"{road['explained']:.0%}", memory, f"{entry['strength']:.3g}", f"{entry['gain']:+.4f}"]
        rows.append([text(name), *map(text, kept)])
    headers = ["road", "centred influences explained", "memory", "strength", "change of the target (nats)"]
    return f"<p>{text(OPTIMAL)}</p>{table(headers, rows, 'roads')}" if rows else ""


def _cost_rows(asked):
    return [
        [text(row["part"]), text(f"{row['runs']:g}"), text(f"{row['seconds'] / 60:.1f}")]
        for row in asked["timing"]["cost"]["parts"]
    ]
