"""The benchmark suites: what their rows compute, how a stopped run resumes, and the evaluation of results."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import CausalLMOutput

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import attention
import charts
import cpu
import gpu
import measure
import peers
import report
import suite
from shapes import SHAPES, Setting
from suite import Book, Clock, Task

SCRIPTS = sorted(path.stem for path in Path(cpu.__file__).parent.glob("*.py"))
QUICK = Setting("quick", length=16, batch=2)
HERE = {"torch": "2", "load": [0.0]}


def record(setting: Setting, row: str, step: float = 1.0, peak: int = 100, **rest) -> dict:
    """The record of a process."""
    times = {"step": [step], "forward": [step / 3], "first": step, "loss": 5.0}
    bytes_ = {"peak": peak, "resident": peak, "activations": peak // 2, "logits": 0}
    return {**asdict(Task(setting, row)), **times, **bytes_, "run": "one", "machine": HERE, **rest}


def failure(setting: Setting, row: str, reason: str = "out of memory") -> dict:
    """The record of a process that failed."""
    record = {"failed": reason, "memory": reason == "out of memory", "run": "one", "machine": HERE}
    return {**asdict(Task(setting, row)), **record}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_imports(script):
    assert importlib.import_module(script).__doc__


# --- what the rows compute


@pytest.mark.parametrize("loss", ["chunked_loss", "recomputed_loss"])
@pytest.mark.parametrize("training", ["full", "lora"])
def test_chunked_loss_is_the_models_own_with_its_gradients(loss, training, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", 10)  # 32 rows: the last chunk is short
    monkeypatch.setattr(peers, "chunked_loss", getattr(peers, loss))
    setting = replace(QUICK, training=training)
    batch = setting.inputs()
    batch["labels"][:, 3:6] = -100
    whole, chunked = setting.model(), peers.ROWS[peers.RIVAL](setting.model(), 0.1)
    expected, found = whole(**batch).loss, chunked(**batch).loss
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    pairs = list(zip(whole.named_parameters(), chunked.named_parameters(), strict=True))
    assert sum(p.grad is not None for (_, p), _ in pairs) >= 14
    for (name, mine), (_, theirs) in pairs:
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(theirs.grad, mine.grad, msg=name)


def test_a_process_measures_a_row_and_records_an_error(tmp_path):
    figures = suite.spawn(Task(QUICK, peers.EAGER, steps=1), tmp_path, None)
    assert figures["peak"] > 0 and figures["activations"] > 0 and len(figures["step"]) == 1
    assert "failed" in suite.spawn(Task(QUICK, "Liger, checkpointing", steps=1), tmp_path, None)


def test_keys_and_values_are_counted_as_the_model_makes_them():
    model, made = QUICK.model(), []
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda _, __, out: made.append(out.nbytes))
    model(**QUICK.inputs())
    assert charts.keys_and_values(QUICK) == sum(made)


# --- plans


def test_every_task_is_planned_once_and_sweeps_share_theirs_with_the_settings():
    tasks = cpu.plan(cpu.arguments([]))
    keys = [(task.setting, task.row, task.round) for task in tasks]
    assert len(set(keys)) == len(keys)
    assert {row for _, row, _ in keys} == set(peers.ROWS)
    assert cpu.SETTINGS["3"] in cpu.lengths() and cpu.SETTINGS["1"] in cpu.ratios()


def test_rounds_are_interleaved():
    rows = [task.row for task in cpu.plan(cpu.arguments(["--parts", "full", "--settings", "1", "--rounds", "2"]))]
    assert rows == [*peers.MAIN, *peers.MAIN]


def test_the_gpu_suite_begins_with_what_its_claims_need():
    tasks = gpu.plan(gpu.arguments([]))
    needed = {row for claim in report.gpu_claims(gpu.BASE) for row in (claim.row, claim.other)}
    assert {task.row for task in tasks[: len(needed)]} == needed
    assert all(task.setting == gpu.BASE for task in tasks[: len(needed)])


# --- resuming


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
    asked = []

    def spawn(task, cache, seconds):
        asked.append(task.row)
        return {"failed": "test", "memory": False} if len(asked) < 3 else None  # then time runs out

    monkeypatch.setattr(suite, "spawn", spawn)
    tasks = [Task(QUICK, row) for row in ("a", "b", "c")]
    assert suite.run(tasks, Book.open(tmp_path / "results.json"), Clock(None)) == 1
    assert suite.run(tasks, Book.open(tmp_path / "results.json"), Clock(None)) == 1
    assert asked == ["a", "b", "c", "c"]


def test_nothing_starts_after_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "spawn", lambda *_: pytest.fail("started"))
    assert suite.run([Task(QUICK, "a")], Book.open(tmp_path / "results.json"), Clock(1e-9)) == 1


# --- the longest sequence


@given(limit=st.integers(0, 5000), shortest=st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_the_longest_length_that_fits_is_found_to_an_eighth(limit, shortest):
    asked = []

    def fits(length):
        asked.append(length)
        return length <= limit

    found, most = gpu.longest(fits, shortest, 4096), 4096
    assert len(set(asked)) == len(asked) < 30
    if limit < shortest:
        assert found == 0
    elif limit >= 2 * most:
        assert found * 2 > most
    else:
        assert found <= limit and (limit - found <= max(1, found // 8) or 2 * found > most)


def test_no_answer_ends_the_search():
    assert gpu.longest(lambda length: None if length > 16 else True, 16, 64) is None


def test_a_probe_answers_for_other_cards():
    task = Task(QUICK, "a", limit=80.0)
    took = {**asdict(replace(task, limit=141.0)), "used": 60 * 2**30, "fits": True}
    full = {**asdict(replace(task, limit=141.0)), "failed": "out of memory", "memory": True}
    broken = {**full, "memory": False}
    assert gpu.answer(task, [took]) is True
    assert gpu.answer(replace(task, limit=48.0), [took]) is False
    assert gpu.answer(task, [full]) is False
    assert gpu.answer(replace(task, limit=200.0), [full]) is None
    assert gpu.answer(task, [broken]) is None
    assert gpu.answer(replace(task, row="b"), [took, full]) is None


# --- evaluation of results


def verdicts(*records: dict) -> list[str]:
    claims = [report.Claim(QUICK, "step", 0.4, peers.RIVAL), report.Claim(QUICK, "peak", 0.5, peers.RIVAL)]
    return [claim.verdict(report.summaries(list(records))) for claim in claims]


def test_a_claim_is_met_or_not_with_its_ratio():
    mine = record(QUICK, peers.DEFAULT, step=0.3, peak=60)
    step, peak = verdicts(mine, record(QUICK, peers.RIVAL))
    assert ": met, 0.300 (0.3 / 1)" in step
    assert ": NOT MET, 0.600 (60 / 100)" in peak


def test_figures_of_two_runs_are_marked_and_missing_ones_fail():
    mine = record(QUICK, peers.DEFAULT, step=0.3)
    assert "two runs" in verdicts(mine, record(QUICK, peers.RIVAL, run="two"))[0]
    assert all("not measured" in verdict for verdict in verdicts(mine))
    for own, theirs in [
        (failure(QUICK, peers.DEFAULT), record(QUICK, peers.RIVAL)),
        (mine, failure(QUICK, peers.RIVAL, "a bug")),
        (failure(QUICK, peers.DEFAULT), failure(QUICK, peers.RIVAL)),
    ]:
        assert all("not measured" in verdict for verdict in verdicts(own, theirs))


def test_a_rival_that_runs_out_of_memory_is_beaten():
    mine = record(QUICK, peers.DEFAULT)
    assert all(": met, " in verdict for verdict in verdicts(mine, failure(QUICK, peers.RIVAL)))


def test_a_summary_is_the_median_over_rounds():
    records = [record(QUICK, peers.EAGER, step=s) | {"round": n} for n, s in enumerate([1.0, 5.0, 2.0])]
    one = report.summaries(records)[QUICK][peers.EAGER]
    assert one["step"] == 2.0 and one["tokens"] == QUICK.batch * QUICK.length / 2.0


def test_a_report_has_every_setting_sweep_and_failure(tmp_path):
    options = cpu.arguments(["--quick", "--out", str(tmp_path)])
    tasks = {(task.setting, task.row) for task in cpu.plan(options)}
    purpose = (cpu.shown(options).settings["3"], peers.EAGER)  # in the sweep by length as well
    records = [record(*task, step=n + 1) for n, task in enumerate(sorted(tasks - {purpose}, key=str))]
    records.append(failure(*purpose, "of purpose"))
    text = report.cpu(records, cpu.shown(options), tmp_path)
    assert all(f"### {setting}\n" in text for setting in cpu.shown(options).settings.values())
    assert "### By length" in text and "### By keep_ratio" in text and "none: of purpose" in text
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert set(pictures) == {"steps.svg", "length.svg", "ratio.svg"}
    assert report.cpu(records, cpu.shown(options), tmp_path) == text
    assert pictures == {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}


def test_the_slope_is_that_of_the_line_through_the_points():
    sweep = {r: {peers.DEFAULT: {"step": 2 * (0.9 + 2.5 * r)}} for r in (0.1, 0.4, 1.0)}
    assert "0.90 F + 2.50 rF" in report.slope(sweep, peers.DEFAULT, {peers.FORWARD: {"step": 2.0}})


def test_the_page_gets_the_report_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cpu: written by benchmarks/cpu.py --report -->\nold\n<!-- cpu: end -->\nafter\n")
    report.write(f"![steps](steps.svg)\n{report.LOSS}\n", tmp_path, page, "cpu")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "![steps](../benchmarks/results/cpu/steps.svg)" in text
    assert "(when-to-use.md#what-a-selection-learns)" in text
    assert report.LOSS in (tmp_path / "report.md").read_text()


def test_the_page_has_the_markers_of_both_suites():
    page = (Path(__file__).parents[1] / "docs/benchmarks.md").read_text()
    for name in ("cpu", "gpu"):
        assert page.count(f"<!-- {name}: written by benchmarks/{name}.py --report -->") == 1
        assert page.count(f"<!-- {name}: end -->") == 1


# --- selected attention


def test_useful_operations_are_those_of_visible_pairs():
    case = attention.Case(batch=2, heads=4, kv_heads=2, length=12, width=8, keep_ratio=0.5)
    operands = attention.Operands.of(case, "cpu")
    seen = live = 0
    for rows in operands.positions.tolist():
        seen += sum(key <= row for row, key in itertools.product(rows, range(12)))
        live += sum(key <= row for row, key in itertools.product(rows, rows))
    unit = 2 * case.width * case.heads
    assert attention.useful(operands, case) == {"forward": 2 * unit * seen, "backward": unit * (3 * seen + 2 * live)}
    every = 2 * 12 * 13 / 2
    assert attention.useful(None, case) == {"forward": 2 * unit * every, "backward": 5 * unit * every}


def test_selected_and_flash_attention_have_the_same_rows():
    case = attention.QUICK[0]
    operands = attention.Operands.of(case, "cpu")
    every, rows = attention.flash(operands)[0](), attention.selected(operands)[0]()
    torch.testing.assert_close(rows, operands.rows(every.detach()).detach())


@pytest.mark.simd  # flex attention's C++ template doesn't compile without vectors
@pytest.mark.slow
def test_flex_attention_has_the_same_rows():
    operands = attention.Operands.of(attention.QUICK[0], "cpu")
    torch.testing.assert_close(attention.flex(operands)[1](), attention.selected(operands)[0]().detach())


def test_shapes_have_the_sizes_in_their_names():
    """Parameters in 10^9, of the configurations that the models' makers publish."""
    for name, size in {"1B": 1.24, "3B": 3.21, "8B": 8.03}.items():
        with torch.device("meta"):
            model = Setting(name, length=16, batch=1, device="meta").model()
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == size
    assert SHAPES["small"].vocab == 4096


def test_saved_bytes_are_those_of_every_compiled_function_of_a_split_model():
    class Split(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = self.inside(x).sin()
            torch._dynamo.graph_break()
            return CausalLMOutput(loss=self.inside(x).cos().sum())

    whole, split = Split(), Split()
    split.compile(backend="aot_eager")
    plain, parts = (measure.saved_bytes(model, {"x": torch.randn(3, 4)}, 99) for model in (whole, split))
    assert parts == plain and plain["activations"] == 3 * 3 * 4 * 4
