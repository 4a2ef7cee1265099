"""The report as an HTML page for a browser. The worst peers stand first; the page does not grow with the mesh."""

from __future__ import annotations

import html

from ovsmesh.dataplane.report import Report, age, timestamp

_MOST = 300
"""Peers and problems on the page."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ovsmesh</title><meta http-equiv="refresh" content="5">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
h1 {{ font-size: 1.3em; border-left: .4em solid #2a7; padding-left: .6em }} h1.bad {{ border-color: #c33 }}
table {{ border-collapse: collapse; margin: 1em 0 }} td, th {{ text-align: left; padding: .15em 1em .15em 0 }}
tr.bad td {{ color: #b00 }} ul {{ color: #b00 }} th {{ color: #666; font-weight: normal }}
</style></head><body>
{body}
</body></html>
"""


def page(report: Report | None) -> str:
    """Return the page; with no report, one that says that there is none yet."""
    return _PAGE.format(body=_body(report) if report else "<h1>not reconciled yet</h1>")


def _row(cells: list[str], tag: str = "td", bad: bool = False) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{' class=bad' if bad else ''}>{inner}</tr>"


def _body(report: Report) -> str:
    me, now = report.self, report.time
    bad = any(c.type == "Degraded" and c.status == "True" for c in report.conditions) or not report.converged
    parts = [f"<h1{' class=bad' if bad else ''}>{html.escape(report.headline)}</h1>"]
    troubles = [str(p) for p in sorted(report.problems, key=lambda p: not p.fatal)] + list(report.unmanaged)
    if troubles:
        parts.append(f"<ul>{''.join(f'<li>{html.escape(text)}' for text in troubles[:_MOST])}</ul>")
    facts = [
        ["node", f"{me.name} {me.address} {me.encapsulation}"],
        ["pod CIDRs", ", ".join(me.pod_cidrs)],
        ["MTU", f"{me.mtu} ({me.mtu_from})"],
        ["Open vSwitch", f"{me.ovs_version} {me.datapath_type}"],
        ["agent since", timestamp(me.agent_since) if me.agent_since is not None else "-"],
        *([c.type, f"{c.status} {c.reason} {c.message}"] for c in report.conditions),
    ]
    parts.append(f"<table>{''.join(map(_row, facts))}</table>")
    rows = [_row(["peer", "address", "pod CIDRs", "port", "rx", "tx", "errors", "changed", "state"], "th")]
    worst = sorted(report.peers, key=lambda peer: peer.state == "ok")
    for peer in worst[:_MOST]:
        t = peer.traffic
        numbers = ["-" if n is None else str(n) for n in ((t.rx_packets, t.tx_packets, t.errors) if t else (None,) * 3)]
        changed = age(now - peer.last_change) + " ago" if peer.last_change is not None else "-"
        state = ": ".join([peer.state, *peer.missing[:1]])
        cells = [peer.name, peer.address, ", ".join(peer.pod_cidrs), peer.port, *numbers, changed, state]
        rows.append(_row(cells, bad=peer.state != "ok"))
    parts.append(f"<table>{''.join(rows)}</table>")
    if len(worst) > _MOST:
        parts.append(f"<p>and {len(worst) - _MOST} more: see <code>ovsmesh status</code></p>")
    parts.append(f"<p>as of {timestamp(now)}</p>")
    return "\n".join(parts)
