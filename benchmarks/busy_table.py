# SPDX-License-Identifier: Apache-2.0
"""Times where threads come late, as busy.py measures them, in Markdown."""

from typing import Any

import table


def render(report: dict[str, Any]) -> str:
    """A heading, where the numbers are from, and a row for each case and mode."""
    counts = [str(count) for count in report["busy"]]
    first = report["cases"][0]["modes"]["inference"]
    columns = list(dict.fromkeys((result["peer"], result["threads"]) for result in first))
    names = [f"{'nn.RNN' if peer == 'nn_rnn' else peer} @{n}" for peer, n in columns]
    lines = [f"| (T, B, I, H) |  |  | {' | '.join(names)} |", f"|---|---|---|{'--:|' * len(names)}"]
    for case in report["cases"]:
        spec = case["spec"]
        for mode, results in case["modes"].items():
            cells = [table.shape(spec), table.extras(spec), mode]
            for column in columns:
                found = [r for r in results if (r["peer"], r["threads"]) == column]
                cells.append(", ".join(table.duration(result["us"]) for result in found))
            lines.append(f"| {' | '.join(cells)} |")
    caption = (
        f"{report['machine']['cpu']}; {table.source(report)}. Mean time of a call with so many "
        f"threads (@), beside {', '.join(counts[:-1])} and {counts[-1]} processes that never rest, "
        f"and last of calls {round(1000 * report['settings']['pause'])} ms apart."
    )
    return "\n".join(["### On busy cores", "", caption, "", *lines])
