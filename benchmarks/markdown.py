"""Markdown that no one types: tables, the numbers in them, and pages whose marked parts are renewed.

Called by tables.py, counts.py and summary.py, and by tests/kernelcheck/audit.py.
"""

import re


def head(cells):
    """The first two lines of a table."""
    return [line(cells), "|---" * len(cells) + "|"]


def line(cells):
    return f"| {' | '.join(cells)} |"


def duration(microseconds):
    if microseconds is None:
        return ""
    for unit, scale in (("us", 1), ("ms", 1e3)):
        if abs(microseconds) < 999.5 * scale:
            return f"{microseconds / scale:.3g} {unit}"
    return f"{microseconds / 1e6:.3g} s"


def size(count):
    """Of so many bytes."""
    for unit, scale in (("B", 1), ("kB", 1e3), ("MB", 1e6)):
        if count < 999.5 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"


def renew(text, kind, tables, every=False):
    """`text` with new tables between its markers `<!-- KIND:NAME -->` and `<!-- /KIND:NAME -->`.

    tables: NAME -> function that returns the table, called only where the page shows it; the name "" stands for
    `<!-- KIND -->`. every: all of them must be there. ValueError where the page has no marker of the kind, one of
    another name, or one that is not closed.
    """

    def renewed(found):
        begin, name, end = found.groups()
        table = tables[name or ""]().rstrip()
        return f"{begin}{table}\n{end}" if table else begin + end

    opened = re.findall(rf"<!-- {kind}(?::(\w+))? -->\n", text)
    for name in opened:
        if name not in tables:
            raise ValueError(f"marker {_mark(kind, name)} must name one of {', '.join(tables)}")
    if not opened:
        raise ValueError(f"no marker {_mark(kind, 'NAME')} in the text")
    for name in tables if every else ():
        if name not in opened:
            raise ValueError(f"no marker {_mark(kind, name)} in the text")
    text, count = re.subn(
        rf"(<!-- {kind}(?::(\w+))? -->\n).*?(<!-- /{kind}(?(2):\2) -->)", renewed, text, flags=re.DOTALL
    )
    if count < len(opened):
        raise ValueError(f"a marker of {', '.join(_mark(kind, name) for name in opened)} is not closed")
    return text


def _mark(kind, name):
    return f"<!-- {kind}{name and ':'}{name} -->"
