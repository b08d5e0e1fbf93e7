"""The recorded numbers: pytest-benchmark's JSON turned into the long-form csv that tables and plots read.

One line a measurement, in the manner of Liger-Kernel's benchmark data: what ran, the metric and its unit, its
median, 20th and 80th percentile, and the machine and versions it ran on. Called by `python -m benchmarks`.
"""

import csv
import json
import statistics
from pathlib import Path

DATA = Path(__file__).parent / "data"
KERNELS = ["dual", "transport", "rowloss", "attack", "train"]
COLUMNS = [
    *("kernel", "case", "provider", "mode", "metric", "unit", "rows", "n", "p50", "p20", "p80"),
    *("rounds", "threads", "config", "device", "torch", "armor", "time"),
]
UNITS = {"error": "relative", "operators": "count", "syncs": "count", "bytes": "B", "peak": "B"}


def from_json(path):
    """Csv records of one pytest-benchmark report: the time of every case, and its metrics, which have no spread.

    There are none if no case was timed; then pytest-benchmark writes no report.
    """
    if not Path(path).exists():
        return []
    report = json.loads(Path(path).read_text())
    cpu = report["machine_info"]["cpu"]
    machine = {"device": cpu.get("brand_raw") or cpu.get("arch", "unknown"), "time": report["datetime"][:19]}
    infos, times = {}, {}
    for bench in report["benchmarks"]:
        info = bench["extra_info"]
        case = tuple(info[name] for name in ("case", "rows", "n", "mode", "provider"))
        infos.setdefault(case, info)
        times.setdefault(case, []).extend(1e6 * seconds for seconds in bench["stats"]["data"])
    records = []
    for case, info in infos.items():
        metrics = info.pop("metrics")
        base = machine | info | {"rounds": len(times[case]), "config": json.dumps(info["config"])}
        records.append(base | {"metric": "time", "unit": "us"} | _percentiles(times[case]))
        for name, value in metrics.items():
            records.append(base | {"metric": name, "unit": UNITS[name]} | _percentiles([value]))
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


def recorded():
    """Kernel -> its records, for every kernel that has some."""
    paths = {kernel: DATA / f"{kernel}.csv" for kernel in KERNELS}
    return {kernel: read(path) for kernel, path in paths.items() if path.exists()}


def _percentiles(values):
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"p50": f"{cuts[4]:.6g}", "p20": f"{cuts[1]:.6g}", "p80": f"{cuts[7]:.6g}"}
