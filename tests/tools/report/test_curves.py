"""Training curves with their held-out measures beside them."""

from mpo_jax.config.schema import MEASURES, TRAINED
from mpo_jax.tools.report.figures import PANELS, Series, curves


def series(run: str, *, held_out: bool, seeds: int = 1) -> Series:
    lines = [{"step": step, "loss": 3 - step / 10} for step in (1, 5, 10)]
    measures = [{"step": step, "eval/loss": 3.5 - step / 10} for step in (4, 8)] if held_out else []
    return Series((run,), ([*lines, *measures],) * seeds)


def test_held_out_measures_are_in_the_panel_of_their_metric():
    """Their own numbers in the chart's rows, and a picture that differs from the one without."""
    (with_measures,) = curves("sft", [series("sft", held_out=True)])
    (without,) = curves("sft", [series("sft", held_out=False)])
    assert [(row["step"], row.get("loss"), row.get("eval/loss")) for row in with_measures.rows] == [
        (1, 2.9, None), (5, 2.5, None), (10, 2.0, None), (4, None, 3.1), (8, None, 2.7)
    ]  # fmt: skip
    assert with_measures.name == without.name == "sft_loss" and with_measures.png != without.png


def test_the_held_out_curve_is_dashed_and_explained_in_the_legend(monkeypatch):
    figures = []
    monkeypatch.setattr(
        "mpo_jax.tools.report.figures.finish", lambda name, title, figure, rows: figures.append(figure) or rows
    )
    curves("dpo", [series("dpo", held_out=True, seeds=2), series("mpo", held_out=False)])
    (axes,) = figures[0].axes
    training, measured, other, explained = axes.get_lines()
    assert training.get_color() == measured.get_color() != other.get_color()
    assert (training.get_linestyle(), measured.get_linestyle()) == ("-", "--")
    assert measured.get_markerfacecolor() == "white" != training.get_markerfacecolor()
    assert list(measured.get_xdata()) == [4, 8] and not len(explained.get_xdata())
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["dpo", "mpo", "on held-out rows"]


def test_every_stage_draws_measures():
    for stage in TRAINED:
        assert {panel.metric for panel in PANELS[stage]} & set(MEASURES[stage])
