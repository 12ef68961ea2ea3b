"""The command line: reading data, results and errors of the commands, and a run of `finetune`, stopped and resumed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from marks import slow
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tokenseek_fx.cli
from tokenseek_fx import TokenSeekWarning
from tokenseek_fx.cli import bench, data, encode, models, watch
from tokenseek_fx.cli.answer import Failure, Usage
from tokenseek_fx.cli.app import app
from tokenseek_fx.peak import forget_peak
from tokenseek_fx.report import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pairs

GOOD, BROKEN = 12, 2
SETTINGS = ["--random-weights", "--skip-bad", "--epochs", "2", "--batch", "4", "--length", "384", "--held-out", "2"]
OPTIONS = ["-o", "inner=eager", "--keep-ratio", "0.25", "--save-every", "100", "--lr", "0.01"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model without weights, its tokenizer, real pairs, and two lines that can't be used."""
    out = tmp_path_factory.mktemp("cli")
    small = ["--width", "48", "--layers", "1", "--vocabulary", "300", "--pairs", str(GOOD)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pairs.py", str(out), *small])
        assert pairs.main() == 0
    with (out / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "def f():"}\nno JSON\n')
    return out


@pytest.fixture(scope="module")
def tokenizer(work):
    return AutoTokenizer.from_pretrained(work / "model")


def tokenseek(*arguments: object):
    """Run a command; return its exit code and output. Unexpected errors are raised. Resets Dynamo first."""
    torch._dynamo.reset()
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)


def finetune(work: Path, out: Path, *more: object):
    with warnings.catch_warnings():
        warnings.simplefilter("error", TokenSeekWarning)
        return tokenseek("finetune", work / "model", work / "pairs.jsonl", *SETTINGS, *OPTIONS, "--out", out, *more)


@pytest.fixture(scope="module")
def ran(work):
    """A complete run: its output and its directory."""
    result = finetune(work, work / "run", "--compare", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), work / "run"


# --- data


def encoded(path: Path, tokenizer, length=48, columns=None, skip_bad=True):
    return encode.sequences(data.rows(str(path)), tokenizer, length, columns, path.name, skip_bad)


def learnt(tokenizer, sequence) -> str:
    return tokenizer.decode([label for label in sequence["labels"] if label != encode.IGNORED])


LINES = {
    b'{"prompt": "a", "completion": "b"}': None,
    b"{'prompt': 'a'}": "not JSON: Expecting property name enclosed in double quotes at column 2",
    b"[1]": "expected an object with columns, got a list",
    b'{"prompt": "a"}': "no 'completion'",
    b'{"prompt": "a", "completion": 3}': "completion: expected text, got int",
    b'{"prompt": "a", "completion": ""}': "the completion is empty",
    b'{"prompt": "\xff", "completion": "b"}': "not UTF-8: invalid start byte at byte 13",
    b'{"prompt": "' + b"xyz" * 50 + b'", "completion": "b"}': "no label in the first 48 tokens: 150 tokens precede it",
}


def test_every_bad_line_is_reported_with_its_number_and_the_reason(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(LINES))
    found = encoded(path, tokenizer)
    reasons = {each.line: each.reason.removesuffix("; raise --length") for each in found.bad}
    assert reasons == {number: reason for number, reason in enumerate(LINES.values(), 1) if reason}
    assert len(found.sequences) == found.rows == 1
    with pytest.raises(Failure, match=r"7 rows can't be used.*--skip-bad\.\n  line 2: not JSON"):
        encoded(path, tokenizer, skip_bad=False)


def test_a_table_with_fields_of_several_lines_is_read(tmp_path, tokenizer):
    path = tmp_path / "data.csv"
    path.write_text('question,answer\na,"b\nc"\nd,e,f\ng,h\n', encoding="utf-8-sig")
    found = encoded(path, tokenizer, columns="question,answer")
    assert [learnt(tokenizer, each) for each in found.sequences] == [f"b\nc{pairs.END}", f"h{pairs.END}"]
    assert [(each.line, each.reason) for each in found.bad] == [(4, "expected 2 fields, got 3")]
    path.write_text('question,answer\na,b\nc,"d\ne,f\n')
    with pytest.raises(Failure, match=r"line 3: a quote that begins here is never closed\."):
        encoded(path, tokenizer, columns="question,answer")


def test_a_text_is_cut_into_windows_and_no_token_is_lost(tmp_path, tokenizer):
    path = tmp_path / "data.txt"
    path.write_text(text := "All of this is learnt. " * 20, encoding="utf-8")
    found = encoded(path, tokenizer)
    assert "".join(learnt(tokenizer, each) for each in found.sequences) == text + pairs.END
    assert {len(each["input_ids"]) for each in found.sequences[:-1]} == {48}


def test_only_assistant_messages_are_labelled(tmp_path, tokenizer):
    talk = [("system", "s"), ("user", "u"), ("assistant", "first"), ("user", "v"), ("assistant", "second")]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}))
    found = encoded(path, tokenizer)
    assert learnt(tokenizer, found.sequences[0]) == f"first{pairs.END}\nsecond{pairs.END}\n"


def test_missing_columns_are_an_error(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": "x", "b": "y"}')
    with pytest.raises(Usage, match=r"The data has none of the known columns .*, but: a, b\."):
        encoded(path, tokenizer)
    with pytest.raises(Usage, match=r"--columns a,c: the data has no column c\. Choose from: a, b\."):
        encoded(path, tokenizer, columns="a,c")


def test_saved_data_sets_and_parquet_are_read(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="data sets by name or directory are optional")
    made = datasets.Dataset.from_dict({"prompt": ["a\n", "b\n"], "completion": ["c", None]})
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "data.parquet")
    for path in (tmp_path / "saved", tmp_path / "data.parquet"):
        found = encoded(path, tokenizer)
        assert [learnt(tokenizer, each) for each in found.sequences] == [f"c{pairs.END}"]
        assert [(each.line, each.reason) for each in found.bad] == [(2, "no 'completion'")]


def test_padding_of_a_batch_is_not_labelled():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8] * 17, "labels": [8] * 17}]
    made = encode.batch_of(rows, pad=1, length=100)
    assert {name: x.shape for name, x in made.items()} == dict.fromkeys(made, (2, 32))
    assert made["attention_mask"].sum(1).tolist() == [3, 17]
    assert made["input_ids"][0, 3:].unique() == 1 and made["labels"][0, 3:].unique() == encode.IGNORED
    assert encode.batch_of(rows, pad=1, length=20)["input_ids"].shape == (2, 20)


# --- finetune


def test_a_run_ends_with_figures_a_model_and_a_report(ran, work):
    figures, out = ran
    assert (figures["rows"], figures["skipped"], figures["held_out"]) == (GOOD, BROKEN, 2)
    assert figures["steps"] == 2 * -(-(GOOD - 2) // 4)
    assert figures["held_out_after"] < figures["held_out_before"] - 0.5
    assert 0.25 <= figures["kept"] < 0.4 and figures["kept_labelled"] > figures["kept"]
    run = Run.load(out)
    assert [step.step for step in run.steps] == list(range(1, figures["steps"] + 1))
    assert run.examples[0].labelled is not None and any(len(each.kept) < len(each.tokens) for each in run.examples)
    assert run.memory["tokenseek"]["activations"] < run.memory["all tokens"]["activations"]
    assert run.memory["tokenseek"]["optimizer"] > run.memory["tokenseek"]["parameters"] and run.graphs
    assert len(run.plain) == len(run.steps) and {step.kept for step in run.plain} == {1.0}
    assert figures["all_tokens"]["held_out_after"] < figures["held_out_before"] - 0.5
    assert any(step.overlap is not None for step in run.steps[3:])
    assert "<html" in Path(figures["report"]).read_text()[:500]
    assert AutoModelForCausalLM.from_pretrained(figures["model"]).config.hidden_size == 48
    assert AutoTokenizer.from_pretrained(figures["model"]).eos_token == pairs.END


@pytest.mark.slow
@pytest.mark.skipif(not forget_peak(torch.device("cpu")), reason="this system can't reset the peak of a process")
def test_the_run_on_all_tokens_is_measured_without_the_first(work, monkeypatch):
    """Neither the temporary memory of the first run nor its model and optimizer count."""
    training_step, much = watch.SeeingTrainer.training_step, 2**29
    held: list[StorageWeakRef] = []
    left: list[int] = []

    def step(self, *given):
        loss = training_step(self, *given)
        if self.seen.directory.name == "all-tokens":
            left.append(sum(not each.expired() for each in held))
        else:
            torch.ones(much, dtype=torch.uint8)
            states = [x for state in self.optimizer.state.values() for x in state.values()]
            held[:] = [StorageWeakRef(x.untyped_storage()) for x in [*self.model.parameters(), *states]]
        return loss

    monkeypatch.setattr(watch.SeeingTrainer, "training_step", step)
    result = finetune(work, work / "measured", "--compare", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert held and set(left) == {0}
    assert figures["all_tokens"]["peak_bytes"] < figures["peak_bytes"] - 0.5 * much  # libraries are loaded meanwhile


def test_skipped_rows_are_saved_beside_the_run(ran):
    left = [json.loads(line) for line in (ran[1] / "skipped.jsonl").read_text().splitlines()]
    assert [(each["line"], each["reason"]) for each in left] == [
        (GOOD + 1, "no 'completion'"),
        (GOOD + 2, "not JSON: Expecting value at column 1"),
    ]
    assert left[1]["text"].strip() == "no JSON"


def test_a_stopped_run_resumes_to_the_same_losses(ran, work, monkeypatch):
    forward = watch.Seen.forward

    def stopped(self, *given):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        forward(self, *given)

    out = work / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(watch.Seen, "forward", stopped)
        patch.setattr(sys, "argv", ["/bin/tokenseek", "finetune", "m"])
        result = finetune(work, out, "--json")
    assert result.exit_code == 130
    answer = json.loads(result.stdout)
    assert answer["checkpoint"].endswith("checkpoint-4") and shlex.split(answer["resume"])[-1] == "--resume"
    assert finetune(work, out).exit_code == 2, "a run is not written over"
    assert finetune(work, out, "--resume", "--seed", "1").exit_code == 2, "nor gone on with otherwise"
    assert finetune(work, out, "--resume").exit_code == 0
    losses = [[step.loss for step in Run.load(each).steps] for each in (ran[1], out)]
    assert losses[0] == losses[1]


def test_a_second_signal_ends_a_run_at_once(work, monkeypatch):
    forward = watch.Seen.forward

    def stopped(self, *given):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        forward(self, *given)

    out, before = work / "at-once", signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(watch.Seen, "forward", stopped)
    result = finetune(work, out, "--json")
    assert result.exit_code == 130 and signal.getsignal(signal.SIGINT) is before
    assert json.loads(result.stdout)["error"] == "Interrupted before anything was saved."


def test_bad_rows_end_a_run_before_anything_is_written(work):
    settings = [each for each in SETTINGS if each != "--skip-bad"]
    result = tokenseek("finetune", work / "model", work / "pairs.jsonl", *settings, "--out", work / "none", "--json")
    assert result.exit_code == 1 and not (work / "none").exists()
    assert f"line {GOOD + 2}: not JSON" in json.loads(result.stdout)["error"]


def test_a_model_without_weights_is_trained_only_if_asked_for(work):
    arguments = ["finetune", work / "model", work / "pairs.jsonl", "--skip-bad", "--out", work / "none"]
    result = tokenseek(*arguments)
    assert result.exit_code == 1 and "--random-weights" in result.stderr
    assert tokenseek(*arguments, "--random-weights", "--lora").exit_code == 2


@pytest.fixture(scope="module")
def weighted(work) -> Path:
    """The model with weights: what adapters need."""
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work / "model"))
    for each in (made, AutoTokenizer.from_pretrained(work / "model")):
        each.save_pretrained(work / "weighted")
    return work / "weighted"


def adapters(weighted: Path, work: Path, out: Path, *more: object):
    """A run of few steps that trains adapters."""
    settings = ["--skip-bad", "--steps", "3", "--batch", "2", "--length", "128", "--held-out", "2", *OPTIONS]
    return tokenseek("finetune", weighted, work / "pairs.jsonl", *settings, "--out", out, *more)


@pytest.mark.parametrize(("kind", "held_out"), [("--lora", 2), ("--qlora", 2), slow("--qlora", 0)])
def test_training_adapters_ends_with_a_table_and_a_report(kind, held_out, weighted, work, tmp_path):
    result = adapters(weighted, work, tmp_path, kind, "--held-out", held_out)
    assert result.exit_code == 0, result.stderr
    assert "held-out loss" in result.stdout and (tmp_path / "report.html").exists()
    run = Run.load(tmp_path)
    assert len(run.steps) == 3 and run.memory and run.graphs and "not in this report" not in run.settings
    files = {each.name for each in (tmp_path / "model").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def test_a_run_that_cannot_be_explained_keeps_its_table_and_its_report(weighted, work, tmp_path, monkeypatch):
    def failing(*given):
        raise AttributeError("no [meta]\nand more")

    monkeypatch.setattr("tokenseek_fx.cli.finetune.explain_without_weights", failing)
    result = adapters(weighted, work, tmp_path, "--lora")
    assert result.exit_code == 0 and "held-out loss" in result.stdout
    missing = "split of memory, graph: AttributeError: no [meta]"
    assert f"The report lacks {missing}\n" in result.stderr
    assert Run.load(tmp_path).settings["not in this report"] == missing
    assert missing in (tmp_path / "report.html").read_text()


def test_evaluation_does_not_change_the_gradient_through_a_4_bit_base(tmp_path):
    """On CPUs with AVX512-BF16, evaluation by bitsandbytes alone leaves weights that give no gradient."""
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path)
    adapter = models.Adapter(quantised=True)
    model = models.with_weights(str(tmp_path), torch.float32, "cpu", adapter, random=False)
    ids = torch.arange(20)[None]

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) == 2 * 2 * 7 and all(torch.equal(after[name], x) for name, x in before.items())


def test_the_report_of_a_run_is_rewritten(ran, tmp_path):
    result = tokenseek("report", ran[1], "--out", tmp_path / "r.html", "--json")
    assert result.exit_code == 0 and Path(json.loads(result.stdout)["report"]).exists()
    assert tokenseek("report", tmp_path).exit_code == 1


# --- the other commands


def test_explain_needs_only_the_configuration(work):
    found = json.loads(tokenseek("explain", work / "model", "--length", "32", "--lora", "--json").stdout)
    assert (found["tokens"], found["kept"], found["barriers"]) == (32, 4, [])
    assert sum(found["saved_bytes"]["tokenseek"].values()) < sum(found["saved_bytes"]["all tokens"].values())


def test_estimate_compares_lengths_and_ratios_with_memory(work):
    arguments = ["estimate", work / "model", "-l", 64, "-r", 0.1, "--gpu", "1KB", "--gpu", "1GB", "--json"]
    found = json.loads(tokenseek(*arguments).stdout)["rows"]
    assert [(row["length"], row["keep_ratio"]) for row in found] == [(64, None), (64, 0.1)]
    assert found[1]["peak_bytes"] < found[0]["peak_bytes"]
    assert all(row["fits"] == {"1KB": False, "1GB": True} for row in found)


@pytest.mark.slow
def test_bench_measures_each_way_in_a_process_and_reports_a_failure(work, monkeypatch):
    arguments = ["bench", work / "model", "-l", 16, "-b", 1, "--steps", 1, "-o", "inner=eager", "--json"]
    result = tokenseek(*arguments, "--way", "tokenseek")
    assert result.exit_code == 0 and json.loads(result.stdout)["ways"]["tokenseek"]["step_seconds"] > 0
    monkeypatch.setattr(bench, "spawn", lambda task: {"failed": "no memory"})
    result = tokenseek(*arguments[:-1])
    assert result.exit_code == 1 and result.stdout.count("failed") == len(bench.WAYS)


def test_doctor_reports_what_works():
    result = tokenseek("doctor", "--quick", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["ok"] and "works: --lora" in found["works"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["explain", "./nothing"], 1, "no such directory"),
        (["explain", "nobody/nothing"], 1, "check the hub id"),
        (["explain", "m", "-o", "keep_ration=0.1"], 2, "Did you mean 'keep_ratio'"),
        (["explain", "m", "-o", "strict"], 2, "expected NAME=VALUE"),
        (["explain", "m", "--batch", "0"], 2, "--batch"),
        (["finetune", "m"], 2, "data"),
    ],
)
def test_errors_have_a_message_and_an_exit_code(arguments, code, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = tokenseek(*arguments)
    assert result.exit_code == code and message in result.stderr and not result.stdout


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    for name in [each for each in sys.modules if each.startswith("tokenseek_fx.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'tokenseek-fx\[cli\]'"):
        tokenseek_fx.cli.main()
