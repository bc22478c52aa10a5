"""The texts that ship, and the tools that keep training, calibration and evaluation apart."""

from mone_edge import demo
from mone_edge.demo.training import texts


def test_calibration_and_evaluation_share_no_run_of_words():
    calibration, evaluation = (
        path.read_text(encoding="utf-8")
        for path in (demo.calibration_text(), demo.evaluation_text())
    )
    assert 300_000 < len(calibration) < 500_000
    assert 300_000 < len(evaluation) < 500_000
    assert texts.ngrams(calibration).isdisjoint(texts.ngrams(evaluation))
    lines = {line.strip() for line in calibration.splitlines() if len(line.strip()) > 60}
    assert lines.isdisjoint(line.strip() for line in evaluation.splitlines())


def test_overlap_is_cut_out_by_the_paragraph():
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    held_out = texts.ngrams(f"Before. {shared}. After.")
    text = f"first paragraph\n\nquoting {shared.upper()}!\n\nlast paragraph"
    assert texts.without_overlap(text, held_out) == "first paragraph\n\nlast paragraph"


def test_runs_shorter_than_asked_for_do_not_count():
    assert texts.ngrams("a b c", 4) == set()
    assert texts.ngrams("A, b c d", 4) == {("a", "b", "c", "d")}


def test_markup_of_python_docs_goes_and_prose_stays():
    source = ".. module:: x\n   :synopsis: y\n\nCall :func:`~os.open` or :ref:`that\n<label>`.\n"
    assert texts.rst_text(source).strip() == "Call os.open or that."


def test_unwrap_joins_lines_and_keeps_paragraphs():
    assert texts.unwrap("a\nb\r\n\n\n  c\n d\n") == "a b\n\nc d"


def test_excerpt_begins_and_ends_at_paragraphs():
    text = "\n\n".join(f"paragraph {i}" for i in range(100))
    cut = texts.excerpt(text, 200, 100)
    assert cut.startswith("paragraph ")
    assert cut.rstrip() in text
    assert len(cut) <= 201
