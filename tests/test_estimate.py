"""Estimates: bytes of hand-made graphs, what they agree with, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx import ConfigError, GraphNotSupported, StepMemory, compat, estimate, explain
from tokenseek_fx.estimation import Estimate, bytes_of
from tokenseek_fx.memory import Live, step_memory
from tokenseek_fx.ops.fully_masked import grad_blind
from tokenseek_fx.ops.head import head_loss
from tokenseek_fx.passes.lower.chunks import CHUNK_BYTES

MIB = 2**20
DROP = {"logits": "drop"}


def llama(device: str = "cpu", layers: int = 1, inner: int = 48, heads: int = 4) -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": 2}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads_of, use_cache=False)).train()


@pytest.fixture(scope="module")
def small() -> Estimate:
    return estimate(llama("meta"), 2, 64, options=DROP)


def step_of(function, *inputs, set_to_none=True):
    """The step of a function, compiled by Inductor; only shapes and ``requires_grad`` of ``inputs`` are read."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in inputs]
    with mode:
        graph = make_fx(function, tracing_mode="real")(*fakes)
    return step_memory(lambda: compat.inductor(None, None)(graph, fakes), fakes, set_to_none)


def product(x, w):
    return ((x @ w).exp().sum(),)


X, W = torch.randn(32, 16), torch.randn(16, 64, requires_grad=True)
RESULT, SCALAR, OF_W = 32 * 64 * 4, 4, 16 * 64 * 4


def test_the_bytes_of_a_graph_are_those_counted_by_hand():
    """exp(x w) [32, 64] is saved; its gradient is computed from it in place, then that of w [16, 64].

    The loss and its incoming gradient exist throughout.
    """
    found = step_of(product, X, W)
    assert found.saved == {"activations": RESULT}
    assert found.forward == RESULT + SCALAR
    assert found.backward == RESULT + 2 * SCALAR + OF_W


def test_existing_gradients_are_not_counted_but_those_added_to_them_are():
    assert step_of(product, X, W, set_to_none=False) == step_of(product, X, W)


def test_storages_count_once_and_only_while_they_live():
    with FakeTensorMode(), Live() as live:
        a = torch.empty(100)
        b = a.view(10, 10)
        assert live.peak == 400
        del a
        c = torch.empty(50)
        assert live.peak == 600
        del b
        assert live.forget_peak() == 600
        d = torch.empty(100)
        assert live.peak == 600
        live.forget_peak()
        live.ignore([c, d])
    assert live.peak == 0


def test_temporary_memory_of_this_packages_operations_counts():
    """Logits [100, 50] of a single block, beside the losses and the gradient."""
    with FakeTensorMode() as mode:
        hidden, weight, target = torch.empty(100, 8), torch.empty(50, 8), torch.empty(100, dtype=torch.long)
        with mode, Live() as live:
            live.ignore([hidden, weight, target])
            head_loss(hidden, weight, None, target, -100, 0.0, 1.0, torch.float32, True)
    assert live.peak > 100 * 50 * 4 + 100 * 8 * 4


def test_temporary_memory_of_the_gradient_of_fully_masked_rows_counts():
    """Scores [16, 64] of a single block, which only the computation of its gradient shows."""
    with FakeTensorMode() as mode:
        query, key = torch.empty(1, 1, 16, 4), torch.empty(1, 1, 64, 4)
        columns, fully_masked = torch.empty(1, 16, dtype=torch.long), torch.empty(1, 16, dtype=torch.bool)
        with mode, Live() as live:
            live.ignore([query, key, columns, fully_masked])
            grad_blind(query, query, key, key, columns, fully_masked, True, None, 0.0)
    assert live.peak > 16 * 64 * 4


@pytest.mark.parametrize("padding", [None, "left"])
def test_eager_attention_is_estimated(padding):
    model = zoo.build("llama", attn="eager", dtype=torch.float32)
    batch = zoo.batch(model, 4, 256, padding)
    step = estimate(model, batch, options=DROP, plain=False).step
    assert max(step.forward, step.backward) < 4 * 4 * 256 * 256 * 4, "less than the scores of an attention"


def test_saved_bytes_are_those_of_the_audit(small, capsys):
    ids = torch.zeros(2, 64, dtype=torch.long)
    assert small.step.saved == explain(llama(), input_ids=ids, labels=ids, options=DROP).rewritten.by_kind()


@pytest.mark.parametrize("made", ["real", "fake"])
def test_models_with_and_without_data_have_the_same_estimate(small, made):
    if made == "real":
        model = llama()
    else:
        with FakeTensorMode():
            model = llama()
    plain = made == "real"
    assert estimate(model, 2, 64, options=DROP, plain=plain) == (small if plain else replace(small, plain=None))


def test_no_kernel_is_compiled_and_no_cache_is_filled(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a kernel is compiled")

    for name in ("cpp", "cpp_pybinding", "triton"):
        monkeypatch.setattr(torch._inductor.async_compile.AsyncCompile, name, refused)
    monkeypatch.setattr(torch._inductor.cpp_builder.CppBuilder, "build", refused)
    known = list(PyCodeCache.modules)
    estimate(llama("meta"), 1, 16, options={"scorer": "random"}, plain=False)
    assert known == PyCodeCache.modules


@pytest.mark.slow
def test_one_model_after_another_of_its_class_with_other_numbers():
    """Dynamo treats a number that changed, here the scale of the scores, as dynamic."""
    torch._dynamo.reset()
    estimate(llama("meta", heads=16), 2, 64, options=DROP, plain=False)
    found = estimate(llama("meta", heads=4), 2, 64, options={**DROP, "memory_budget": "1GiB"}, plain=False)
    torch._dynamo.reset()
    assert found == estimate(llama("meta", heads=4), 2, 64, options={**DROP, "recompute": "none"}, plain=False)


@pytest.mark.slow
def test_memory_grows_with_the_length_and_with_the_share_of_tokens(small):
    longer = estimate(llama("meta"), 2, 128, options=DROP)
    more = estimate(llama("meta"), 2, 64, options={**DROP, "keep_ratio": 0.5}, plain=False)
    for name in ("forward", "backward"):
        assert getattr(longer.step, name) > getattr(small.step, name)
        assert getattr(longer.plain, name) > getattr(small.plain, name)
    assert sum(more.step.saved.values()) > sum(small.step.saved.values())
    assert more.step.backward > small.step.backward


def test_training_on_all_tokens_equals_plain_compile():
    whole = estimate(llama("meta"), 1, 16, options={"keep_ratio": 1})
    assert whole.step == whole.plain


def test_on_a_gpu_the_head_of_all_tokens_holds_no_logits():
    """In half precision, for which there is a kernel."""
    sizes = {"batch": 2, "seq": 64, "options": DROP, "plain": False, "dtype": torch.bfloat16}
    cpu, gpu = (estimate(llama("meta"), **sizes, device=device).step for device in ("cpu", "cuda"))
    assert gpu.saved == cpu.saved and gpu.forward < cpu.forward


@pytest.mark.slow
def test_on_a_gpu_chunks_are_those_of_a_gpu(monkeypatch):
    options = {**DROP, "scorer": "random", "recompute": "rows"}

    def step() -> StepMemory:
        return estimate(llama("meta", layers=2, inner=512), 2, 256, options=options, plain=False, device="cuda").step

    whole = step()
    monkeypatch.setitem(CHUNK_BYTES, "cuda", 256 * 1024)  # a fourth of the widest value
    assert step().saved == whole.saved and step().forward < whole.forward


def test_only_trained_parameters_have_gradients_and_states():
    model = llama("meta")
    parameters = sum(p.numel() * 4 for p in model.parameters())
    model.requires_grad_(False)
    head = model.lm_head.requires_grad_(True).weight
    found = estimate(model, 1, 16, options=DROP, plain=False)
    assert found.parameters == parameters + sum(b.numel() * 4 for b in model.buffers())
    assert (found.gradients, found.optimizer, found.update) == (head.numel() * 4, head.numel() * 8, head.numel() * 8)
    assert found.plain is None
    assert found.plain_peak is None


def test_a_dtype_converts_parameters(small):
    half = estimate(llama("meta"), 2, 64, options=DROP, dtype=torch.bfloat16, plain=False)
    assert half.gradients == small.gradients // 2
    assert half.step.forward < small.step.forward


STEP = StepMemory({"rows": 5}, forward=30, backward=50)


def test_the_peak_is_the_largest_of_forward_backward_and_update():
    sizes = {"parameters": 100, "gradients": 10, "optimizer": 20, "inputs": 1, "step": STEP}
    found = Estimate(**sizes, update=40)
    assert found.phases() == {"forward": 151, "backward": 171, "update": 171}
    assert Estimate(**sizes, update=90).peak == 221
    kept = Estimate(**sizes, update=40, set_to_none=False)
    assert kept.phases() == {"forward": 161, "backward": 181, "update": 171}


def test_it_fits_where_the_peak_is_no_larger():
    found = Estimate(0, 0, 0, 0, 0, StepMemory({}, forward=MIB, backward=5))
    assert found.fits(MIB)
    assert found.fits("1MiB")
    assert not found.fits("1 MB")
    assert not found.fits(MIB - 1)


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("0.5gb", 5 * 10**8), (7, 7)])
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24 apples", "", "GiB", "-3GB", True])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="is not a memory size: expected bytes, or text such as '24GiB'"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch": 2}, "seq=None: expected an integer of at least 1"),
        ({"batch": 0, "seq": 8}, "batch=0: expected an integer of at least 1"),
        ({"batch": {}, "seq": 8}, "seq=8: example inputs have a length already"),
        ({"batch": 1, "seq": 8, "optimizer": "lion"}, "optimizer='lion': expected 'adamw', 'adam', 'sgd'"),
        ({"batch": 1, "seq": 8, "optimizer": -1}, "optimizer=-1: expected a name, bytes per parameter"),
        ({"batch": 1, "seq": 8, "device": "tpu"}, "device='tpu': expected 'cpu' or 'cuda'"),
        ({"batch": 1, "seq": 8, "options": {"inner": "eager"}}, "the estimate reads the code that Inductor generates"),
        ({"batch": 1, "seq": 8, "options": {"keep": 1}}, "Unknown option 'keep'"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        estimate(llama("meta"), **arguments)


def test_a_model_without_token_ids_needs_example_inputs():
    with pytest.raises(ConfigError, match="forward of Linear takes no input_ids and no labels: pass example inputs"):
        estimate(nn.Linear(2, 2), 1, 8)


def test_what_cannot_be_rewritten_is_refused():
    class NoAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x).sum()

    with pytest.raises(GraphNotSupported, match="No attention was found"):
        estimate(NoAttention(), {"x": torch.randn(2, 3)})
    with pytest.raises(GraphNotSupported, match="Nothing requires grad"):
        estimate(NoAttention().requires_grad_(False), {"x": torch.randn(2, 3)})


def test_the_report_has_a_column_for_each_way_to_train(small):
    lines = str(small).splitlines()
    assert lines[0].split()[-2:] == ["tokenseek", "torch.compile"]
    assert f"{small.peak / MIB:.1f}" in lines[[line.split()[0] for line in lines].index("peak")]
    assert lines[-1].split() == ["fits", "in", "141", "GB", "yes", "yes"]


def test_the_model_stays_as_it_was():
    model = llama()
    before = dict(model.named_parameters())
    estimate(model, 1, 16, options={"scorer": "random"}, plain=False)
    assert all(p is before[name] and p.grad is None for name, p in model.named_parameters())
    model.compile(backend="tokenseek", options={"inner": "eager", "scorer": "random", "strict": True})
    ids = torch.zeros(1, 16, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokenseek_fx.TokenSeekWarning)
        model(input_ids=ids, labels=ids).loss.backward()
