"""The report: a page that draws itself, pictures, tables; what it says without libraries."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

from mbkern.bench import cli, tables
from mbkern.bench.measure import summarise
from mbkern.bench.report import figures, pictures
from mbkern.bench.report.write import report, tables_of
from mbkern.bench.rows import Row, append, load

CHROMIUM = next(
    (c for c in ("chromium", "chromium-browser", "google-chrome") if shutil.which(c)), None
)
FRAME = """<!doctype html><body><iframe id="f" src="report.html#THEME" width="390" height="800">
</iframe><script>
const frame = document.getElementById("f");
setInterval(() => {
  const inner = frame.contentDocument.body;
  Object.assign(document.body.dataset, inner.dataset);
  document.body.dataset.ink = frame.contentWindow.getComputedStyle(inner).color;
}, 100);
</script></body>"""


def _row(suite: str, provider: str, size: int, seconds: float, **facts: object) -> Row:
    row = Row(suite, f"case </script> {size}", [size], "float32", "both", provider, "cpu", "", 2)
    row.samples_s = [seconds * (1 + 0.01 * (k % 3)) for k in range(9)]
    row.environment = {"cpu": "a CPU", "before": {"load": 0.1}}
    row.size, row.axis, row.baseline, row.error_vs_fp64 = size, "elements", "torch", 1e-7
    for name, value in facts.items():
        setattr(row, name, value)
    summarise(row)
    return row


def _rows() -> list[Row]:
    found = []
    for size in (1, 8, 64):
        for provider, speed in (("torch", 3e-6), ("mbkern in place", 1e-6)):
            found.append(
                _row("minibatch", provider, size, 1e-5 + speed * size, axis="micro-batch",
                     extra={"series": "loss gradient", "range": "loss ends at 64.", "cut_items": 99,
                            "bits_different": 99 // size, "loss_error": 1e-7 / size})
            )  # fmt: skip
            found.append(
                _row("minibatch", provider, size, 1e-5 + speed * size / 2, direction="forward",
                     axis="micro-batch", extra={"series": "loss function"})
            )  # fmt: skip
            found.append(
                _row("scaling", provider, size, speed * size, axis="rows",
                     extra={"series": "loss over rows"})
            )  # fmt: skip
            found.append(
                _row("cross_entropy", provider, size, speed * size, bytes=12 * size,
                     peak_bytes=4 << 20, axis="classes")
            )  # fmt: skip
        found.append(
            _row("cross_entropy", "limit: bare pass", size, 5e-7 * size, bytes=8 * size, limit=True)
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    append(made / "rows.jsonl", _rows())
    assert cli.main(["report", str(made / "rows.jsonl"), "--output", str(made)]) == 0
    return made


def test_every_kind_of_figure_is_drawn() -> None:
    drawn = {f.key.split("-")[0]: f for f in figures.all_of(_rows())}
    assert set(drawn) == {"minibatch", "scaling", "speedup", "size", "roofline", "memory"}
    knee = {line.name: line.mark for line in drawn["minibatch"].lines}
    assert knee == {
        f"{provider} · {what}": 64
        for provider in ("torch", "mbkern in place")
        for what in ("gradient", "function")
    }
    bits, errors = drawn["minibatch"].panels
    assert [line.y for line in bits.lines] == [[99, 12, 1]] * 2
    assert [line.y for line in errors.lines] == [[1e-7, 1e-7 / 8, 1e-7 / 64]] * 2
    assert "99 samples" in drawn["minibatch"].note
    assert "loss ends at 64." in drawn["minibatch"].note
    slopes = [line.name.split()[-1] for line in drawn["scaling"].lines]
    assert slopes == ["1.00", "1.00"]
    (ours,) = drawn["speedup"].lines
    assert ours.y == pytest.approx([3.0, 3.0, 3.0])
    assert all(low <= y <= high for low, y, high in zip(ours.low, ours.y, ours.high, strict=True))


def test_the_page_is_self_contained(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    without_plotly = re.sub(r"<script>/\*\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["']https?:""", without_plotly)
    assert page.count("class='plot'") == len(figures.all_of(_rows()))
    assert "case </script>" not in page
    assert (folder / "report.md").read_text().count("## ") == 6
    for text in (page, (folder / "report.md").read_text()):
        assert "IQR: distance of their quartiles over the median" in text
    assert "- loss ends at 64." in (folder / "report.md").read_text()
    for figure in figures.all_of(_rows()):
        for suffix in ("png", "svg"):
            assert (folder / f"{figure.key}.{suffix}").stat().st_size > 5000


def test_every_figure_has_a_file_of_its_own() -> None:
    """Of several losses in one file, too."""
    found = [
        _row(suite, "mbkern", size, 1e-6 * size, threads=1, extra={"series": f"{loss} {what}"})
        for suite, what in (("minibatch", "gradient"), ("scaling", "over rows"))
        for loss in ("cross_entropy", "mse_loss")
        for size in (1, 8, 64)
    ]
    drawn = figures.all_of(found)
    assert len(drawn) == len({figure.key for figure in drawn}) == 4
    assert all("1 thread" in f.title and "1 threads" not in f.title for f in drawn[:2])


def test_memory_that_nothing_was_taken_of_is_drawn() -> None:
    found = [
        _row("s", "torch", 8, 1e-6, peak_bytes=4 << 20),
        _row("s", "mbkern in place", 8, 1e-6, peak_bytes=0),
        _row("s", "mbkern", 8, 1e-6),
    ]
    (memory,) = [f for f in figures.all_of(found) if f.key == "memory-s"]
    assert {line.name: line.y for line in memory.lines} == {"torch": [4.0], "mbkern in place": [0]}


def test_no_two_in_a_picture_have_one_colour() -> None:
    """The seventh provider had the colour of the first, and all limits had one."""
    found = [_row("s", "torch", 8, 1e-6, bytes=8), _row("s", "mbkern in place", 8, 1e-6, bytes=8)]
    found += [_row("s", f"mbkern {k}", 8, 1e-6, bytes=8) for k in range(12)]
    found += [_row("s", f"limit: {k}", 8, 1e-6, bytes=8, limit=True) for k in range(4)]
    for figure in figures.all_of(found):
        colours = [line.colour for line in figure.lines]
        assert len(set(colours)) == len(colours) >= 13


def test_a_figure_says_what_it_is_compared_with_and_which_way_is_good() -> None:
    drawn = {f.key.split("-")[0]: f for f in figures.all_of(_rows())}
    assert drawn["speedup"].title.startswith("Speed-up over torch: cross_entropy, ")
    assert "at 1 is faster" in drawn["speedup"].note
    assert " forward and backward, over " in drawn["size"].title
    assert drawn["size"].note.startswith("Lower is better")
    assert drawn["roofline"].note.startswith("Higher is better")


def test_devices_and_caches_are_apart() -> None:
    """A GPU's points lay on the CPU's lines, and its memory was not drawn."""
    found = [
        _row("cross_entropy", provider, size, scale * speed * size, axis="classes", bytes=8,
             peak_bytes=mib << 20, run=f"{device}{cache}", device=device, cache=cache,
             threads=threads)
        for device, cache, threads, scale, mib in (
            ("cpu", "warm", 2, 1.0, 4), ("cpu", "cold", 2, 2.0, 4), ("cuda", "warm", 1, 0.1, 6),
        )
        for provider, speed in (("torch", 3e-6), ("mbkern", 1e-6))
        for size in (1, 8, 64)
    ]  # fmt: skip
    drawn = figures.all_of(found)
    places = ("default allocator, 2 threads", "default allocator, cold caches, 2 threads",
              "default allocator, cuda, 1 thread")  # fmt: skip
    for start in ("Speed-up over torch: cross_entropy, ", "Time against size: cross_entropy "):
        titles = [f.title for f in drawn if f.title.startswith(start)]
        assert [t.rpartition(start)[2].endswith(p) for t, p in zip(titles, places, strict=True)]
        lines = [line for f in drawn if f.title.startswith(start) for line in f.lines]
        assert all(len(line.x) == len(set(line.x)) == 3 for line in lines)
    memory = [f for f in drawn if f.key.startswith("memory")]
    assert [f.lines[0].y for f in memory] == [[4.0] * 3, [4.0] * 3, [6.0] * 3]
    (table,) = (t for t in tables_of(found) if t.title == "cross_entropy")
    shown = [row[4] for row in table.rows if row[0]]
    assert sorted(set(shown)) == ["default", "default, cold caches", "default, cuda"]


def test_series_of_several_threads_and_caches_are_told_apart() -> None:
    """Two rows of a table, and two lines of a picture, had one name."""
    found = [
        _row(suite, "mbkern", size, 1e-6 * size, threads=threads, cache=cache, run=cache,
             extra={"series": "loss over rows"})
        for suite in ("minibatch", "scaling")
        for cache in ("warm", "cold")
        for threads in (1, 2)
        for size in (4, 8, 64)
    ]  # fmt: skip
    drawn = figures.all_of(found)
    assert len({f.title for f in drawn}) == len(drawn) == 8
    assert all(len(f.lines) == 1 for f in drawn)
    minibatch, scaling = (t for t in tables_of(found) if t.title[0] in "TG")
    for table in (minibatch, scaling):
        assert len({tuple(row[:4]) for row in table.rows}) == 4
        assert [row[table.head.index(" threads")] for row in table.rows] == ["1", "2", "1", "2"]
    assert {row[4] for row in minibatch.rows} == {"-"}, "none is at 1 sample"


def test_suites_and_providers_may_be_called_anything(tmp_path: Path) -> None:
    """A suite's name was a path, and a dot in a provider's ended in a traceback."""
    found = [
        _row(suite, provider, 8, 1e-6, peak_bytes=4 << 20, bytes=8)
        for suite in ("../up/s", "..?up?s", "s")
        for provider in ("torch", "a · b")
    ]
    append(tmp_path / "rows.jsonl", found)
    written, _ = report([tmp_path / "rows.jsonl"], tmp_path / "here", "t")
    assert len(set(written)) == len(written) == 2 + 2 * len(figures.all_of(found))
    assert {path.parent for path in written} == {tmp_path / "here"}
    assert all(path.exists() for path in written)


def test_titles_have_no_lonely_last_word() -> None:
    title = "Speed-up over the baseline: cross_entropy, default allocator, 2 threads"
    lines = pictures._even_lines(title)
    assert " ".join(lines) == title
    assert len(lines) == 2
    assert min(map(len, lines)) > 25
    assert pictures._even_lines("Short") == ["Short"]


def test_a_drawn_table_has_every_cell_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal of less than 235 columns the times were cut to '72…'."""
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(tables, "is_plain", lambda stream: False)
    (table,) = [t for t in tables_of(_rows()) if t.title == "cross_entropy"]
    words = "a note of many words, which may take more than one line of its column " * 3
    rows = [[*row[:-1], words] for row in table.rows]
    tables.show(tables.Table(table.title, table.head, rows))
    drawn = capsys.readouterr().out
    assert "…" not in drawn
    for row in table.rows:
        assert all(cell in drawn for cell in row[:-1])
    assert max(map(len, drawn.splitlines())) < 300


@pytest.mark.parametrize(
    ("variables", "plain"),
    [({}, False), ({"TERM": "dumb"}, True), ({"NO_COLOR": ""}, True), ({"TERM": ""}, False)],
)
def test_where_plain_text_is_printed(
    variables: dict[str, str], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    assert tables.is_plain(stream) == plain


def _of_two_runs(*, torch: str = "2.2", commit: str = "b") -> list[Row]:
    """The second measures one provider at some of the sizes again, four times slower."""
    found: list[Row] = []
    for run, environment, scale, providers, sizes in (
        ("first", {"cpu": "X", "torch": "2.1", "commit": "a"}, 1, ("torch", "mbkern"), (1, 2, 8)),
        ("second", {"cpu": "X", "torch": torch, "commit": commit}, 4, ("mbkern",), (1, 2)),
    ):
        found += [
            _row(suite, provider, size, scale * 1e-6 * size, run=run, environment=environment,
                 extra={"series": "loss gradient"})
            for provider in providers
            for size in sizes
            for suite in ("cross_entropy", "minibatch")
        ]  # fmt: skip
    return found


def test_ratios_are_of_rows_of_one_run() -> None:
    found = _of_two_runs()
    drawn = {f.key.split("-")[0]: f for f in figures.all_of(found)}
    (ours,) = drawn["speedup"].lines
    assert ours.x == ["case </script> 8 float32"]
    assert ours.y == pytest.approx([1.0])
    sizes = {line.name: line.x for line in drawn["minibatch"].lines}
    assert sizes == {"torch · gradient": [1, 2, 8], "mbkern · gradient": [1, 2]}
    (table,) = [t for t in tables_of(found) if t.title == "cross_entropy"]
    assert sum("x (" in cell for row in table.rows for cell in row) == 1


def test_a_report_on_two_machines_says_so_and_lists_both(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    rows = _of_two_runs()
    for path, run in zip(paths, ("first", "second"), strict=True):
        skipped = _row("cross_entropy", "Liger", 1, 1.0, status="skipped", environment={})
        skipped.samples_s = []
        append(path, [*(row for row in rows if row.run == run), skipped])
    report(paths, tmp_path, "t", with_pictures=False)
    for text in ((tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()):
        assert "WARNING: these rows are of 2 machines or versions" in text
        assert "torch: 2.1 in machine 1, 2.2 in machine 2" in text
        assert "commit: a in machine 1, b in machine 2" in text
        assert "cpu: X in" not in text
        assert "4 rows were measured again later" in text, "and what was skipped twice was not"
        assert "Machine 1 of 2" in text
        assert "Machine 2 of 2" in text
    append(tmp_path / "one.jsonl", _of_two_runs(torch="2.1", commit="a"))
    report([tmp_path / "one.jsonl"], tmp_path, "t", with_pictures=False)
    assert "WARNING" not in (tmp_path / "report.md").read_text()


def test_files_are_utf_8_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plotly has letters that ASCII and Latin-1 lack, and the page says that it is UTF-8."""
    append(tmp_path / "rows.jsonl", _rows())
    opened = io.open

    def in_ascii(file: object, mode: str = "r", *args: object, **named: object) -> object:
        encoding = named.get("encoding") or (args[1] if len(args) > 1 else None)
        if "b" not in mode and encoding in (None, "locale"):
            args, named = (), {"encoding": "ascii"}
        return opened(file, mode, *args, **named)

    monkeypatch.setattr(io, "open", in_ascii)
    report([tmp_path / "rows.jsonl"], tmp_path, "größer", with_pictures=False)
    assert "<h1>größer</h1>" in (tmp_path / "report.html").read_bytes().decode()
    assert "# größer" in (tmp_path / "report.md").read_bytes().decode()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="NOT CHECKED: no browser; Debian's package: chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_the_page_at_a_phones_width(folder: Path, theme: str) -> None:
    assert CHROMIUM is not None
    frame = folder / f"{theme}.html"
    frame.write_text(FRAME.replace("THEME", theme))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body is not None
    facts = dict(re.findall(r'data-(\w+)="([^"]*)"', body[0]))
    assert facts["errors"] == ""
    assert int(facts["drawn"]) == len(figures.all_of(_rows()))
    assert int(facts["overflow"]) == 0
    red = int(re.findall(r"\d+", facts["ink"])[0])
    assert red > 200 if theme == "dark" else red < 60


def test_what_is_missing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    assert cli.main(["report", str(folder / "rows.jsonl")]) == 2
    assert "pip install 'mbkern[bench]'" in capsys.readouterr().err


def test_without_a_measured_row_there_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("cut off\n")
    with pytest.raises(ValueError, match=r"no row .* has been measured; .*, line 1: not a row"):
        report([path], tmp_path, "t")
    with pytest.raises(SystemExit):
        cli.main(["report", str(path), "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples_s", "0.1"), ("samples_s", [0.1, None]), ("suite", ["s"]), ("interval_s", [0.1]),
     ("peak_bytes", "x"), ("environment", True), ("median_s", []), ("limit", None),
     ("extra", 1.5), ("threads", [1])],
)  # fmt: skip
def test_a_row_with_a_field_of_another_type_is_left_out(
    field: str, value: object, tmp_path: Path
) -> None:
    """It ended in a traceback of Python's."""
    path = tmp_path / "rows.jsonl"
    good, bad = _rows()[:2]
    path.write_text(good.to_json() + "\n" + json.dumps(json.loads(bad.to_json()) | {field: value}))
    found, warnings = load(path)
    assert [row.key for row in found] == [good.key]
    assert warnings == [f"{path}, line 2: not a row ({field} is {value!r}); left out"]


def test_a_broken_command_line_needs_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mbkern", "bench", "report", "no-such-file.jsonl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
