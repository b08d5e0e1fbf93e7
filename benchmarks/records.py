"""The recorded numbers: pytest-benchmark's JSON turned into the long-form csv that tables and plots read.

One line a measurement, in the manner of Liger-Kernel's benchmark data: what ran, the metric and its unit, its
median, 20th and 80th percentile, and the machine and versions it ran on. Called by `python -m benchmarks`.
"""

import csv
import json
import statistics
from pathlib import Path

DATA = Path(__file__).parent / "data"
COLUMNS = [
    *("kernel", "divergence", "provider", "mode", "metric", "unit", "rows", "n", "p50", "p20", "p80"),
    *("rounds", "threads", "config", "device", "torch", "armor", "time"),
]


def from_json(path):
    """Csv records of one pytest-benchmark report: the time of every case and the error of its value."""
    report = json.loads(Path(path).read_text())
    machine = {"device": report["machine_info"]["cpu"]["brand_raw"], "time": report["datetime"][:19]}
    records = []
    for bench in report["benchmarks"]:
        info = bench["extra_info"]
        error = info.pop("error")
        info["config"] = json.dumps(info["config"])
        base = info | machine | {"rounds": bench["stats"]["rounds"]}
        microseconds = [1e6 * seconds for seconds in bench["stats"]["data"]]
        records.append(base | {"metric": "time", "unit": "us"} | _percentiles(microseconds))
        if error is not None:
            records.append(base | {"metric": "error", "unit": "relative"} | _percentiles([error]))
    return records


def write(path, records):
    """Writes records as csv in the order of `COLUMNS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read(path):
    """The csv's records, with the numbers as numbers."""
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    for record in records:
        record.update({key: int(record[key]) for key in ("rows", "n", "rounds", "threads")})
        record.update({key: float(record[key]) for key in ("p50", "p20", "p80")})
    return records


def _percentiles(values):
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"p50": f"{cuts[4]:.6g}", "p20": f"{cuts[1]:.6g}", "p80": f"{cuts[7]:.6g}"}
