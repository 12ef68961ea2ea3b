"""The figures of ``tokenseek_fx.stats``, recomputed with lists and sets, by hand, and on a real recording."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from fractions import Fraction
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scores import Decoder, tokens

import tokenseek_fx
from tokenseek_fx import Recording, Selection, stats

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
Sets = list[list[set[int]]]


def selection(rows: Sequence[Sequence[int]], length: int, **known: Any) -> Selection:
    """A selection by hand."""
    return Selection(
        torch.tensor(rows), torch.zeros(len(rows), length), **{k: torch.as_tensor(v) for k, v in known.items()}
    )


@st.composite
def recordings(draw, names: int = 4) -> Recording:
    """A few steps of different shapes; every sequence is one of ``names``, and some value of each step is not 0."""
    return Recording(draw(st.lists(steps(names), min_size=1, max_size=5)))


@st.composite
def steps(draw, names: int) -> Selection:
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 12]))
    rows = rows_of(draw, batch, length)
    table = lambda values: torch.tensor(  # noqa: E731
        draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=batch, max_size=batch))
    )
    amount = st.integers(0, 8).map(lambda n: n / 8)
    known = {"labelled": table(st.booleans()), "gradient": table(amount), "loss": table(amount)}
    for value in known.values():
        value[0, 0] = True
    instances = draw(st.lists(st.integers(0, names - 1), min_size=batch, max_size=batch))
    return Selection(rows, torch.zeros(batch, length), **known, instances=torch.tensor(instances))


def rows_of(draw: Any, batch: int, length: int) -> torch.Tensor:
    kept = draw(st.integers(1, length))
    return torch.tensor([sorted(draw(st.permutations(range(length)))[:kept]) for _ in range(batch)])


def jaccard(a: set[int], b: set[int]) -> Fraction:
    return Fraction(len(a & b), len(a | b))


def share(recording: Recording, name: str) -> float:
    """Every row of every step, one number at a time."""
    kept = whole = 0.0
    for step in recording:
        for rows, values in zip(step.indices.tolist(), getattr(step, name).tolist(), strict=True):
            whole += sum(map(float, values))
            kept += sum(float(values[i]) for i in rows)
    return kept / whole


# ---- against plain Python


@EXAMPLES
@given(recordings())
def test_shares(recording):
    assert stats.labelled_kept(recording) == pytest.approx(share(recording, "labelled"))
    assert stats.gradient_kept(recording) == pytest.approx(share(recording, "gradient"))
    assert stats.loss_kept(recording) == pytest.approx(share(recording, "loss"))


@EXAMPLES
@given(recordings(), st.integers(1, 13))
def test_positions(recording, bins):
    places = [Fraction(i, step.scores.shape[1]) for step in recording for i in step.indices.flatten().tolist()]
    counts = [sum(Fraction(b, bins) <= p < Fraction(b + 1, bins) for p in places) for b in range(bins)]
    found = stats.position_histogram(recording, bins)
    assert found.shape == (bins,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx([count / len(places) for count in counts])
    assert found.sum().item() == pytest.approx(1)


@EXAMPLES
@given(recordings(), st.data())
def test_overlap(recording, data):
    other = [
        Selection(rows_of(data.draw, *step.scores.shape), step.scores, instances=step.instances) for step in recording
    ]
    pairs = [
        (set(a), set(b))
        for x, y in zip(recording, other, strict=True)
        for a, b in zip(x.indices.tolist(), y.indices.tolist(), strict=True)
    ]
    assert stats.overlap(recording, other) == pytest.approx(float(mean(jaccard(a, b) for a, b in pairs)))
    assert stats.overlap(other, recording) == pytest.approx(stats.overlap(recording, other))
    assert stats.overlap(recording, recording) == 1


@EXAMPLES
@given(recordings())
def test_overlap_of_visits(recording):
    visits = [
        ((name, step.scores.shape[1]), set(rows))
        for step in recording
        for name, rows in zip(step.instances.tolist(), step.indices.tolist(), strict=True)
    ]
    pairs = []
    for at, (name, rows) in enumerate(visits):
        earlier = [before for other, before in visits[:at] if other == name]
        pairs += [jaccard(earlier[-1], rows)] if earlier else []
    if pairs:
        assert stats.visit_overlap(recording) == pytest.approx(float(mean(pairs)))
    else:
        with pytest.raises(ValueError, match="No sequence was visited twice"):
            stats.visit_overlap(recording)


# ---- by hand


def test_steps_are_weighted_by_their_tokens():
    """Of 1 + 5 labelled tokens 1 + 2 are kept: the mean over steps would differ."""
    one = selection([[0]], 4, labelled=[[True, False, False, False]])
    five = selection([[0, 1, 2]], 8, labelled=[[True, True, False, True, True, True, False, False]])
    assert stats.labelled_kept([one, five]) == 0.5


def test_visits_in_turns():
    """Sequence 7 keeps {0, 1}, {1, 2}, {1, 2}; 8 keeps {3, 4} once; 9 keeps {0, 2} in one row, {0, 3} in the next."""
    recording = [
        selection([[0, 1], [3, 4]], 5, instances=[7, 8]),
        selection([[1, 2], [0, 2], [0, 3]], 5, instances=[7, 9, 9]),
        selection([[1, 2]], 5, instances=[7]),
    ]
    assert stats.visit_overlap(recording) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)


def test_the_same_fingerprint_at_another_length_is_another_sequence():
    with pytest.raises(ValueError, match="No sequence was visited twice"):
        stats.visit_overlap([selection([[0]], 5, instances=[7]), selection([[0]], 6, instances=[7])])


def test_a_random_choice_has_the_overlap_that_the_page_names():
    torch.manual_seed(0)
    a, b = ([selection(torch.rand(200, 100).argsort(-1)[:, :10].tolist(), 100)] for _ in range(2))
    assert stats.overlap(a, b) == pytest.approx(0.1 / (2 - 0.1), abs=0.01)


def test_fingerprints_are_compared_where_both_are_known():
    known, unknown = selection([[0]], 4, instances=[1]), selection([[0]], 4)
    assert stats.overlap([known], [unknown]) == 1


def test_half_precision():
    gradient = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    assert stats.gradient_kept([selection([[1]], 2, gradient=gradient)]) == 0.75


# ---- errors

STEP = selection([[0], [1]], 4, instances=[1, 2])
FIGURES = (stats.labelled_kept, stats.gradient_kept, stats.loss_kept, stats.visit_overlap, stats.position_histogram)
RECORD = r"The recording is empty. Run a training step of a compiled model under tokenseek_fx.record\(\)."
SAME = r"Record both over the same batches in the same order \(a data loader with the same seed\)."


@pytest.mark.parametrize("figure", [*FIGURES, stats.summary])
def test_an_empty_recording(figure):
    with pytest.raises(ValueError, match=RECORD):
        figure(Recording())


@pytest.mark.parametrize(
    ("figure", "name", "remedy"),
    [
        (stats.labelled_kept, "labelled", "Compute a loss over tokens in the compiled model, and keep fewer"),
        (stats.gradient_kept, "gradient", 'Record with a scorer that computes it: "tokenseek" or "gradient".'),
        (stats.loss_kept, "loss", 'Record with a scorer that computes it: "tokenseek", "gradient" or "loss".'),
        (stats.visit_overlap, "instances", r"Pass token ids \[B, T\] to the compiled model"),
    ],
)
def test_what_was_not_recorded(figure, name, remedy):
    known = {name: torch.ones(1, 4) if name != "instances" else torch.ones(1)}
    with pytest.raises(ValueError, match=f"`{name}` was not recorded in step 1. {remedy}"):
        figure([selection([[0]], 4, **known), selection([[0]], 4)])


@pytest.mark.parametrize("name", ["labelled", "gradient", "loss"])
def test_a_share_of_a_figure_that_is_0(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0 for every token.* Record steps that have labels."):
        getattr(stats, f"{name}_kept")([selection([[0]], 4, **{name: torch.zeros(1, 4)})])


def test_recordings_of_other_batches():
    with pytest.raises(ValueError, match=f"The recordings have 2 and 1 steps. {SAME}"):
        stats.overlap([STEP, STEP], [STEP])
    longer = selection([[0], [1]], 5)
    with pytest.raises(ValueError, match=f"differ in step 0: 2 sequences of 4 tokens and 2 sequences of 5 .*{SAME}"):
        stats.overlap([STEP], [longer])
    other = selection([[0], [1]], 4, instances=[1, 3])
    with pytest.raises(ValueError, match=f"saw different sequences in step 1, row 1. {SAME}"):
        stats.overlap([STEP, STEP], [STEP, other])


def test_bins():
    with pytest.raises(ValueError, match="bins=0: expected at least 1"):
        stats.position_histogram([STEP], bins=0)


# ---- summary


def test_summary_leaves_out_what_is_not_known():
    found = stats.summary([STEP, STEP], bins=4)
    assert (found.steps, found.sequences, found.tokens, found.kept) == (2, 4, 16, 4)
    assert found.positions == (0.5, 0.5, 0, 0) and found.visit_overlap == 1
    assert found.labelled_kept is found.gradient_kept is found.loss_kept is None
    assert str(found).splitlines() == [
        "kept 4 of 16 tokens (steps: 2, sequences: 4)",
        "  of all tokens        25.0%",
        "  of labelled tokens   unknown",
        "  of the gradient      unknown",
        "  of the loss          unknown",
        "  overlap of visits    100.0%",
        "  by position          start ██▁▁ end, highest bar 50.0%",
    ]


def test_examples_in_the_docstrings():
    assert doctest.testmod(stats).failed == 0


# ---- a real recording


def epochs(scorer: str, order: list[list[int]]) -> list[Recording]:
    """One recording for every epoch over two batches, whose rows come in a given order."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batches = Decoder(), [tokens(seed) for seed in (0, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options = {"scorer": scorer, "keep_ratio": 0.3, "inner": "eager", "strict": True}
    step = torch.compile(model, backend="tokenseek", options=options)
    found = []
    for rows in order:
        with tokenseek_fx.record() as rec:
            for batch in batches:
                optimizer.zero_grad()
                step(**{name: value[rows] for name, value in batch.items()}).backward()
                optimizer.step()
        found.append(rec)
    return found


def test_two_epochs_of_a_decoder():
    first, second = epochs("tokenseek", [[0, 1, 2], [0, 1, 2]])
    both = [*first, *second]
    for name in ("labelled", "gradient", "loss"):
        assert getattr(stats, f"{name}_kept")(both) == pytest.approx(share(Recording(both), name))
    labelled = sum((tokens(seed)["labels"] != -100).sum().item() for seed in (0, 1))
    assert sum(step.labelled.sum().item() for step in first) == labelled
    assert stats.visit_overlap(both) == pytest.approx(stats.overlap(first, second))
    assert 0.2 < stats.visit_overlap(both) < 1, "the weights moved, and the choice with them, but not all of it"
    found = stats.summary(both)
    assert (found.steps, found.sequences) == (4, 12) and found.kept == 12 * 4
    assert None not in (found.labelled_kept, found.gradient_kept, found.loss_kept, found.visit_overlap)


def test_sequences_are_recognised_in_another_order():
    first, second = epochs("strided", [[0, 1, 2], [2, 0, 1]])
    assert stats.visit_overlap([*first, *second]) == 1
    with pytest.raises(ValueError, match="saw different sequences in step 0, row 0"):
        stats.overlap(first, second)


def test_two_scorers_on_the_same_batches():
    (ends,), (starts,), (gradient,) = (epochs(name, [[0, 1, 2]]) for name in ("last", "first", "gradient"))
    assert stats.overlap(ends, starts) == 0
    assert 0 <= stats.overlap(ends, gradient) < 1
    with pytest.raises(ValueError, match="`gradient` was not recorded in step 0"):
        stats.gradient_kept(ends)
