"""A folder of results as one HTML page: tables and plots a person would rather look at.

In: a folder with what the commands wrote: GGUFs, statistics, plans, and the `--json` of `eval` and
`bench`. Out: `Results`, and a page that needs no other file. Of GGUFs only headers are read. What a
JSON file is, its keys say; files that hold something else are left alone.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mone_edge import gguf_file, low_rank, plots
from mone_edge.console import human_bytes
from mone_edge.documents import parse_json
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import atomic_write, is_file
from mone_edge.plan import FORMAT as PLAN_FORMAT
from mone_edge.plan import PrunePlan
from mone_edge.stats import ExpertStats

TEMPLATE = Path(__file__).with_name("report.html")
SUFFIXES = (".gguf", ".json", ".safetensors")
BENCH_KEY = "tokens_per_second"
NOTHING = "-"
DRAWN = 50  # models; a figure of more shows nothing
LARGEST = sys.float_info.max  # a whole number of a JSON file may be larger

Document = Mapping[str, Any]


@dataclass
class ModelResults:
    """All that a folder holds about one model; what was not measured is None or empty."""

    name: str
    file_bytes: int | None = None
    experts: int | None = None  # of a layer, before pruning
    kept: tuple[int, ...] = ()  # experts with weights, by layer; empty: all
    method: str = ""
    replacement: str = ""
    eval: dict[str, Any] = field(default_factory=dict)  # the keys of `eval --json`
    speeds: dict[str, Document] = field(default_factory=dict)  # test -> a result of `bench --json`

    @property
    def removed(self) -> float | None:
        """Share of the experts that are gone; None where only measurements are there."""
        if self.experts is None:
            return None
        if not self.kept or not self.experts:
            return 0.0
        return 1 - sum(self.kept) / (self.experts * len(self.kept))

    @property
    def bench(self) -> Document:
        """What all tests of a file share: peak memory, novice hits."""
        return next(iter(self.speeds.values()), {})

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "file_bytes": self.file_bytes,
            "removed_fraction": None if self.removed is None else round(self.removed, 6),
            **self.eval,
            "tokens_per_second": {t: row[BENCH_KEY] for t, row in self.speeds.items()},
        }


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Args:
        statistics, plans: by file name.
        ignored: files that look like results and cannot be read, with the reason.
    """

    folder: Path
    models: tuple[ModelResults, ...]
    statistics: Mapping[str, ExpertStats]
    plans: Mapping[str, PrunePlan]
    ignored: Mapping[str, str]


def files(folder: Path) -> list[Path]:
    """What a report of a folder may read (not of those inside it).

    Raises:
        MoneEdgeError: it is no folder, or cannot be read.
    """
    try:
        found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and is_file(p))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise MoneEdgeError(
            f"cannot read the folder {folder}: {why}; give the one your results are in"
        ) from error
    return [path for path in found if not _is_later_part(path)]


def _is_later_part(path: Path) -> bool:
    """Whether it is of a split GGUF, and not the first file of it, which stands for all."""
    match = gguf_file.PART.fullmatch(path.name)
    return match is not None and int(match["number"]) > 1


def gather(folder: Path) -> Results:
    """Read a folder.

    Raises:
        MoneEdgeError: it is none, or holds no result.
    """
    models: dict[str, ModelResults] = {}
    statistics: dict[str, ExpertStats] = {}
    plans: dict[str, PrunePlan] = {}
    ignored: dict[str, str] = {}
    for path in files(folder):
        try:
            if path.suffix == ".gguf":
                _add_gguf(models, path)
            elif path.suffix == ".safetensors":
                if not low_rank.is_novices(path):
                    statistics[path.name] = ExpertStats.load(path)
            else:
                document = _json(path)
                if isinstance(document, dict) and document.get("format") == PLAN_FORMAT:
                    plans[path.name] = PrunePlan.load(path)
                else:
                    _add_measurements(models, document)
        except MoneEdgeError as error:
            ignored[path.name] = str(error)
    if not models and not statistics and not plans:
        raise MoneEdgeError(
            f"{folder} holds no GGUF, statistics, plan, or JSON of eval or bench; write them "
            f"there: mone-edge eval MODEL --ppl FILE --json > {folder / 'eval.json'}"
        )
    largest_first = sorted(models.values(), key=lambda m: (-(m.file_bytes or 0), m.name))
    return Results(folder, tuple(largest_first), statistics, plans, ignored)


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise MoneEdgeError(f"cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise MoneEdgeError(f"not JSON: {error}") from error


def _add_gguf(models: dict[str, ModelResults], path: Path) -> None:
    headers = gguf_file.parts(path)
    experts, kept = gguf_file.experts_left(headers)
    found = _model(models, path.name)
    found.file_bytes = sum(header.file.stat().st_size for header in headers)
    found.experts, found.kept = experts, kept
    found.method = _text(headers[0].value("mone.method", ""))
    found.replacement = _text(headers[0].value("mone.replacement", ""))


def _model(models: dict[str, ModelResults], path: str) -> ModelResults:
    """The results of a file, wherever it was when it was measured."""
    name = _text(Path(path).name)
    return models.setdefault(name, ModelResults(name))


def _text(value: Any) -> str:
    """Somebody else's text, without what no font has and no page may hold."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _add_measurements(models: dict[str, ModelResults], document: Any) -> None:
    """Results of `eval` and `bench`; a later file of the same model and kind replaces."""
    for row in document if isinstance(document, list) else [document]:
        if not isinstance(row, dict) or not isinstance(row.get("model"), str):
            continue
        is_bench = _number(row.get(BENCH_KEY)) and isinstance(row.get("test"), str)
        scores = {key: row[key] for key in row if key.startswith(("ppl", "kld_", "same_top_p"))}
        scores = {key: value for key, value in scores.items() if _number(value)}
        tasks = row.get("tasks")
        if not is_bench and not scores and not isinstance(tasks, dict):
            continue
        found = _model(models, row["model"])
        if found.file_bytes is None and _number(row.get("file_bytes")):
            found.file_bytes = int(row["file_bytes"])
        if is_bench:
            found.speeds[_text(row["test"])] = row
        else:
            found.eval |= scores
            if isinstance(tasks, dict):
                found.eval["tasks"] = {_text(name): _score(s) for name, s in tasks.items()}


def _score(score: Any) -> Any:
    """What is a number of a task's result, or of an average."""
    if isinstance(score, dict):
        return {str(key): value for key, value in score.items() if _number(value)}
    return score if _number(score) else {}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


Cell = Callable[[ModelResults], str]


@dataclass(frozen=True)
class Table:
    """Headers, and rows of cells; the first column names the row."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(results: Results) -> list[Table]:
    """Models with all that was measured, and task accuracies where there are some."""
    tests = dict.fromkeys(test for model in results.models for test in model.speeds)
    columns: dict[str, Cell] = {
        "model": lambda m: m.name,
        "file": lambda m: human_bytes(m.file_bytes) if m.file_bytes is not None else "",
        "experts removed": lambda m: "" if m.removed is None else f"{m.removed:.1%}",
        "kept a layer": lambda m: _span(m.kept),
        "method": lambda m: m.method,
        "replacement": lambda m: m.replacement,
        "perplexity": lambda m: _measured(m.eval, "ppl", "ppl_stderr", "{:.2f}"),
        "KL divergence": lambda m: _measured(m.eval, "kld_mean", "kld_stderr", "{:.4f}"),
        "same top token": lambda m: _measured(m.eval, "same_top_p", "", "{:.1%}"),
        **{f"{test} t/s": _speed_of(test) for test in tests},
        "peak memory": lambda m: (
            human_bytes(m.bench["peak_rss_bytes"]) if _number(m.bench.get("peak_rss_bytes")) else ""
        ),
        "novice hits": lambda m: _measured(m.bench, "novice_hit_ratio", "", "{:.1%}"),
    }
    made = [_table("Models", columns, results.models)] if results.models else []
    asked = [m for m in results.models if "tasks" in m.eval]
    names = dict.fromkeys(name for m in asked for name in m.eval["tasks"])
    if asked:
        accuracies: dict[str, Cell] = {"model": lambda m: m.name}
        accuracies |= {name: _accuracy_on(name) for name in names}
        made.append(_table("Accuracy on tasks", accuracies, asked))
    return made


def _speed(row: Document) -> tuple[float, float]:
    """Tokens per second, and their standard deviation where it is known."""
    return row[BENCH_KEY], row["stddev"] if _number(row.get("stddev")) else 0.0


def _table(title: str, columns: Mapping[str, Cell], models: Sequence[ModelResults]) -> Table:
    """Without the columns that no model fills."""
    cells = {name: [cell(model) for model in models] for name, cell in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    rows = zip(*([cell or NOTHING for cell in column] for column in filled.values()), strict=True)
    return Table(title, tuple(filled), tuple(rows))


def _span(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _measured(row: Document, value: str, error: str, form: str) -> str:
    if not _number(row.get(value)):
        return ""
    text = form.format(row[value])
    return f"{text} ± {form.format(row[error])}" if _number(row.get(error)) else text


def _speed_of(test: str) -> Cell:
    return lambda model: _measured(model.speeds.get(test, {}), BENCH_KEY, "stddev", "{:.1f}")


def _accuracy_on(task: str) -> Cell:
    return lambda model: _accuracy(model.eval["tasks"].get(task))


def _accuracy(score: Any) -> str:
    if _number(score):  # an average
        return f"{score:.1%}"
    return _measured(score, "acc", "acc_stderr", "{:.1%}") if isinstance(score, dict) else ""


def figures(results: Results) -> dict[str, str]:
    """Title -> SVG, of what there is something to draw of; of the largest models, if many."""
    made = {}
    models = results.models[:DRAWN]
    apart = [m for m in models if m.file_bytes and _number(m.eval.get("kld_mean"))]
    if apart:
        made["What the bytes buy"] = plots.quality_and_size(
            [(m.name, m.file_bytes or 0, m.eval["kld_mean"]) for m in apart]
        )
    timed = [m for m in models if m.speeds]
    if timed:
        made["Speed on this machine"] = plots.speeds(
            {m.name: {t: _speed(row) for t, row in m.speeds.items()}
             for m in timed}
        )  # fmt: skip
    uneven = {m.name: m.kept for m in models if len(set(m.kept)) > 1}
    if uneven:
        made["Experts kept in each layer"] = plots.kept_experts(uneven)
    for name, stats in results.statistics.items():
        origin = stats.provenance.fingerprint
        removed = {
            plan_name: {layer: plan.pruned(layer) for layer in plan.num_experts}
            for plan_name, plan in results.plans.items()
            if plan.fingerprint == origin
        }
        for plan_name, gone in (removed or {"": {}}).items():
            title = f"How often each expert is used: {name}"
            title += f", and what {plan_name} removes" if plan_name else ""
            loads = {
                layer: s.count * s.num_experts / max(1, s.count.sum())
                for layer, s in stats.layers.items()
            }
            made[title] = plots.expert_load(loads, gone)
    return made


def write(results: Results, path: Path) -> None:
    """The page, in one file without scripts or links to others.

    Raises:
        MoneEdgeError: it cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    # names of files and models are whatever somebody called them: all is escaped but our own SVG
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        folder=str(results.folder.resolve()),
        tables=tables(results),
        figures=figures(results),
        plans=results.plans,
        ignored=results.ignored,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def to_json(results: Results, path: Path) -> dict[str, Any]:
    """The document of `report --json`."""
    return {
        "html": str(path),
        "bytes": path.stat().st_size,
        "models": [model.to_json() for model in results.models],
        "statistics": list(results.statistics),
        "plans": list(results.plans),
        "ignored": dict(results.ignored),
    }
