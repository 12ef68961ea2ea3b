"""Training set-ups: adapters, quantised bases, mixed precision, checkpointing, DDP, losses outside, packed batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bitsandbytes
import compare
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
import zoo
from accelerate.utils import convert_outputs_to_fp32
from compare import TOPK, by_reference, error, executed, grads_of, saved
from marks import PYTORCH, slow
from peft.tuners.lora import dora
from peft.tuners.lycoris_utils import LycorisLayer
from test_custom_op import barriers  # noqa: F401 (a fixture)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.trainer_pt_utils import LabelSmoother

import tokenseek_fx
from tokenseek_fx import TokenSeekWarning

T = 13
# compiled as users do it, but for the inner compiler
assert_matches = partial(compare.assert_matches, inner="eager")
compiled = partial(compare.compiled, inner="eager")
#: Through AOTAutograd, as Inductor gets the graph: for adapters, quantised bases and autocast.
AOT = {"inner": "aot_eager"}
OPTIONS = {"inner": "eager", "keep_ratio": 0.3, "report_loss": "kept", "strict": True, **TOPK}
LOSS_OUTSIDE = {name: value for name, value in OPTIONS.items() if name != "report_loss"}
# The loss of transformers is in float32.
TOL = 1e-6
TARGETS = ["q_proj", "v_proj", "down_proj"]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def llama(dtype: torch.dtype = torch.float64, layers: int = 2) -> nn.Module:
    return zoo.build("llama", dtype=dtype, layers=layers)


def batch(model: nn.Module, padding: str | None = "right", **changes: Any) -> dict[str, Tensor]:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {**zoo.batch(inner, 3, T, padding=padding), **changes}


def adapted(config: peft.PeftConfig, model: nn.Module | None = None) -> peft.PeftModel:
    """The model with adapters of random weights: with PEFT's initial weights, most gradients are 0."""
    model = peft.get_peft_model(model if model is not None else llama(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def lora(model: nn.Module | None = None, **settings: Any) -> peft.PeftModel:
    return adapted(peft.LoraConfig(r=zoo.LORA_RANK, target_modules=TARGETS, task_type="CAUSAL_LM", **settings), model)


def steps(model: nn.Module, batches: list[dict], optimizer: torch.optim.Optimizer, clip: float) -> Iterator[Tensor]:
    """Compiled training with clipped gradients; yields the kept rows of every step."""
    step = torch.compile(model, backend="tokenseek", options=OPTIONS)
    for inputs in batches:
        with tokenseek_fx.record() as rec:
            step(**inputs).loss.backward()
        _update(model, optimizer, clip)
        yield rec[0].indices


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


# -- PEFT -------------------------------------------------------------------------------------------------------------


def without_drawn_dropout(model: nn.Module) -> nn.Module:
    """LoHa's forward draws a number in training, ``if torch.rand(1) > module_dropout``, which Dynamo can't trace."""
    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.training = False
    return model


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lora,
    "LoRA and the head": lambda: lora(modules_to_save=["lm_head"]),
    "LoHa": lambda: without_drawn_dropout(adapted(peft.LoHaConfig(r=4, alpha=4, target_modules=TARGETS))),
    "IA3": lambda: adapted(
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "AdaLoRA": lambda: adapted(peft.AdaLoraConfig(target_modules=TARGETS, total_step=9, init_r=6, target_r=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, barriers):  # noqa: F811
    model = ADAPTERS[name]()
    run = assert_matches(model, batch(model), TOL, **AOT)
    assert set(run.grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not barriers


@pytest.mark.parametrize("first", ["compile", "adapters"])
def test_a_model_is_compiled_in_place_before_its_adapters_or_after(first):
    base = llama()
    if first == "compile":
        base.compile(backend="tokenseek", options=OPTIONS)
    model = lora(base)
    if first == "adapters":
        model.compile(backend="tokenseek", options=OPTIONS)
    inputs = batch(model)
    with tokenseek_fx.record() as rec:
        model(**inputs).loss.backward()
    assert len(rec) == 1 and rec[0].indices.shape[1] < T
    assert error(grads_of(model), by_reference(lora(), inputs, rec[0].indices).grads) < TOL


def test_dora(monkeypatch):
    """PEFT asks for the module of a weight's class, which Dynamo of PyTorch 2.11 can trace and later ones can't."""
    model = lora(use_dora=True)
    if PYTORCH == (2, 11):
        assert_matches(model, batch(model), TOL)
    else:
        with pytest.raises(Exception, match="can't be rewritten"):
            compiled(model, batch(model))
    monkeypatch.setattr(dora, "dequantize_module_weight", lambda layer: layer.weight)
    run = assert_matches(model, batch(model), TOL)
    assert any("magnitude" in name for name in run.grads)


def test_loha_with_its_dropout_falls_back_with_a_warning():
    model = ADAPTERS["LoHa"]().train()
    plain = copy.deepcopy(model)
    step = torch.compile(model, backend="tokenseek", options={**OPTIONS, "strict": False})
    with pytest.warns(TokenSeekWarning, match="can't be rewritten"):
        step(**batch(model)).loss.backward()
    plain(**batch(model)).loss.backward()
    assert error(grads_of(model), grads_of(plain)) < TOL


def test_prompt_tuning_keeps_the_prompt():
    """The prompt learns only through kept rows, so its positions are pinned."""
    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    run = assert_matches(model, batch(model), TOL, length=T + 4, pinned=range(4), keep_ratio=0.5)
    assert (run.indices[:, :4] == torch.arange(4)).all()
    assert run.grads["prompt_encoder.default.embedding.weight"].abs().min() > 0


def test_dropout_of_lora_has_the_distribution_of_the_definition():
    """Each stream draws its own masks, so single steps can't be compared.

    In one layer the masks of the kept rows are independent of all others in the definition as well, so the gradients
    have the same distribution and the same mean.
    """
    model = lora(llama(layers=1), lora_dropout=0.5)
    inputs, count = batch(model), 400
    step = torch.compile(
        copy.deepcopy(model), backend="tokenseek", options={**OPTIONS, "inner": "eager", "scorer": "strided"}
    )
    indices = compiled(model, inputs, scorer="strided", **AOT).indices
    ours = [_gradient(step._orig_mod, step, inputs) for _ in range(count)]
    eager = copy.deepcopy(model)
    with tokenseek_fx.reference.ditching(eager, indices):
        theirs = [_gradient(eager, eager, inputs) for _ in range(count)]
    assert _standard_errors(ours, theirs).square().mean() < 1.5, "1 is expected"
    with tokenseek_fx.reference.ditching(still := copy.deepcopy(model).eval(), indices):
        without = [_gradient(still, still, inputs)] * count
    assert _standard_errors(ours, without).square().mean() > 3, "the comparison tells other distributions apart"


def _gradient(model: nn.Module, call: Callable, inputs: dict) -> Tensor:
    model.zero_grad()
    call(**inputs).loss.backward()
    return torch.cat([grad.flatten() for grad in grads_of(model).values()])


def _standard_errors(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """The difference of two means, entry by entry, in its standard errors."""
    a, b = torch.stack(one), torch.stack(other)
    return (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / len(one)).sqrt().clamp_min(1e-12)


def test_adapters_in_float32_on_a_frozen_bfloat16_base():
    model = lora(llama(BF16))
    run = assert_matches(model, batch(model), 1e-2)  # bfloat16: sums over the keys in another order
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {BF16}
    assert {grad.dtype for grad in run.grads.values()} == {torch.float32}


def test_a_merged_model_equals_the_trained_adapter():
    model = lora()
    before, inputs = copy.deepcopy(model), batch(model)
    list(steps(model, [inputs] * 2, torch.optim.SGD(model.parameters(), 0.5), clip=1.0))
    with torch.no_grad():
        trained = model(**inputs).logits
        assert (trained - before(**inputs).logits).abs().max() > 1e-2
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, trained, rtol=0, atol=1e-9)


# -- quantised bases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    llama(torch.float32).save_pretrained(path)
    return str(path)


def quantised(path: str, dtype: torch.dtype, nested: bool = True) -> nn.Module:
    """The model with 4-bit weights, loaded as QLoRA does."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype
    )
    load = transformers.LlamaForCausalLM.from_pretrained
    return load(path, quantization_config=config, dtype=dtype, device_map="cpu").train()


def qlora(path: str, dtype: torch.dtype = torch.float32, nested: bool = True) -> peft.PeftModel:
    return lora(quantised(path, dtype, nested).requires_grad_(False))


@pytest.mark.parametrize(
    ("dtype", "tol", "nested"), [(torch.float32, 1e-5, True), (BF16, 1e-2, True), slow(torch.float32, 1e-5, False)]
)
def test_qlora(saved_llama, dtype, tol, nested):
    model = qlora(saved_llama, dtype, nested)
    run = assert_matches(model, batch(model), tol, **AOT)
    assert all("lora" in name for name in run.grads)


@pytest.mark.parametrize(
    "options", [slow({"kv_grad": "all"}), {"scorer": "tokenseek"}, slow({"scorer": "loss", "select": "sample"})]
)
def test_qlora_with_options(saved_llama, options):
    blocks = "base_model.model.model.layers" if "kv_grad" in options else None
    model = qlora(saved_llama)
    assert_matches(model, batch(model), 1e-5, open_blocks=blocks, **options)


@pytest.mark.slow
def test_qlora_by_inductor(saved_llama):
    model = qlora(saved_llama)
    del model.get_base_model().model.layers[1:]
    assert_matches(model, batch(model), 1e-5, inner="inductor")


def test_a_quantised_base_stays_quantised_and_is_no_barrier(saved_llama):
    model = zoo.lora(quantised(saved_llama, torch.float32))
    packed = {name: p.clone() for name, p in model.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    assert len(packed) == 14 and {p.dtype for p in packed.values()} == {torch.uint8}
    report = tokenseek_fx.explain(model, **batch(model))
    assert not report.barriers and not report.rewritten.unexplained
    list(steps(model, [batch(model)] * 2, torch.optim.SGD(model.parameters(), 0.5), clip=1.0))
    for name, before in packed.items():
        after = model.get_parameter(name)
        assert torch.equal(after, before) and after.grad is None


@pytest.mark.parametrize("nested", [True, False])
def test_rows_of_a_4_bit_product_stay_apart(nested):
    """The law of its axes rule."""
    layer = bitsandbytes.nn.Linear4bit(
        24, 20, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32
    )
    layer = layer.to("cpu")
    x, rows = torch.randn(3, T, 24), torch.tensor([0, 4, 5])
    torch.testing.assert_close(layer(x)[:, rows], layer(x[:, rows]), rtol=0, atol=1e-6)


def test_lora_on_a_base_in_8_bits(saved_llama):
    """Its forward sets the data of every weight to the buffer that it has: no write."""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    load = transformers.LlamaForCausalLM.from_pretrained
    model = lora(load(saved_llama, quantization_config=config, dtype=torch.float32, device_map="cpu").train())
    assert_matches(model, batch(model), 1e-6, inner="eager")
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.float32}


def test_weights_that_are_tensor_subclasses_are_refused_with_a_reason():
    """For example those of torchao; a subclass of torch's own tests stands in for them."""
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    wrapped = TwoTensor(weight.detach(), weight.detach())
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(wrapped, requires_grad=False)
    with pytest.raises(Exception, match="is a TwoTensor, a tensor made of other tensors"):
        compiled(model, batch(model))


# -- mixed precision --------------------------------------------------------------------------------------------------


def in_autocast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as accelerate prepares it for mixed precision."""
    forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(type(model).forward))
    model.forward = forward.__get__(model)
    return model


def rounding(dtype: torch.dtype) -> float:
    """Selected attention accumulates in float32 and rounds its results; PyTorch's attention rounds at other places.

    They differ by a rounding or two of half precision. In float32 and float64 the tolerance is tight.
    """
    return 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "scorer"), [(BF16, "random"), (BF16, "loss"), (BF16, "tokenseek"), (torch.float16, "tokenseek")]
)
def test_autocast_around_the_call(dtype, scorer):
    model = llama(torch.float32)
    with torch.autocast("cpu", dtype):
        assert_matches(model, batch(model), rounding(dtype), scorer=scorer, **AOT)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast_inside_the_model(dtype):
    model = llama(torch.float32)
    inputs = batch(model)
    ours, eager = (in_autocast(copy.deepcopy(model), dtype) for _ in range(2))
    ours.compile(backend="tokenseek", options={**OPTIONS, **AOT})
    with tokenseek_fx.record() as rec:
        output = ours(**inputs)
    output.loss.backward()
    with tokenseek_fx.reference.ditching(eager, rec[0].indices):
        expected = eager(**inputs)
        expected.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=rounding(dtype), atol=0)
    assert error(grads_of(ours), grads_of(eager)) < rounding(dtype)
    assert output.logits.dtype == torch.float32


def test_float16_with_a_gradient_scaler():
    """Scaled gradients equal the reference's; if they overflow, the step is skipped and the scale halved."""
    model = llama(torch.float32)
    before, inputs = copy.deepcopy(model), batch(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = torch.compile(model, backend="tokenseek", options={**OPTIONS, **AOT})
    with tokenseek_fx.record() as rec, torch.autocast("cpu", torch.float16):
        loss = step(**inputs).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    with torch.autocast("cpu", torch.float16):
        expected = by_reference(before, inputs, rec[0].indices)
    assert error(grads_of(model), expected.grads) < 1e-2  # float16: the scale moves what is rounded to 0
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    after = copy.deepcopy(model)
    huge = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        huge.scale(step(**inputs).loss).backward()
    huge.step(optimizer)
    huge.update()
    assert torch.equal(model.lm_head.weight, after.lm_head.weight) and huge.get_scale() == 2.0**39


def test_pure_bfloat16():
    model = llama(BF16)
    run = assert_matches(model, batch(model), 1e-2)
    assert {grad.dtype for grad in run.grads.values()} == {BF16}


# -- training ---------------------------------------------------------------------------------------------------------


def test_steps_with_clipped_gradients_train_as_the_reference_does():
    model = llama()
    eager, inputs = copy.deepcopy(model), [zoo.batch(model, 3, T, seed=i) for i in range(3)]
    chosen = list(steps(model, inputs, torch.optim.AdamW(model.parameters(), 1e-2), clip=0.1))
    optimizer = torch.optim.AdamW(eager.parameters(), 1e-2)
    for indices, given in zip(chosen, inputs, strict=True):
        with tokenseek_fx.reference.ditching(eager, indices):
            eager(**given).loss.backward()
        _update(eager, optimizer, 0.1)
    assert error(dict(model.named_parameters()), dict(eager.named_parameters())) < 1e-5


@pytest.mark.parametrize(("build", "reentrant"), [(lora, True), slow(llama, False)])
def test_gradient_checkpointing_changes_nothing(build, reentrant):
    """It is inlined: same gradients, same saved bytes."""
    model = build()
    inputs = batch(model)
    plain, bytes_ = executed(model, inputs, scorer="strided"), saved(model, inputs).if_recomputed(0).bytes
    model = copy.deepcopy(model)  # which is captured again
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if isinstance(model, peft.PeftModel):
        model.disable_input_require_grads()
    assert error(compiled(model, inputs, scorer="strided", **AOT).grads, plain.grads) < 1e-12
    assert saved(model, inputs).if_recomputed(0).bytes == bytes_


def test_inputs_that_a_hook_makes_require_grad_split_the_model():
    """What transformers does for checkpointing with adapters; Dynamo can't trace it."""
    model = lora()
    model.enable_input_require_grads()
    with pytest.raises(Exception, match="can't be rewritten"):
        compiled(model, batch(model))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("outside", [False, True])
def test_ddp(outside):
    """Either the module inside is compiled, or DDP itself."""
    model = llama()
    inputs, before = batch(model), copy.deepcopy(model)
    if not outside:
        model.compile(backend="tokenseek", options=OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(model)
    step = torch.compile(wrapped, backend="tokenseek", options=OPTIONS) if outside else wrapped
    with tokenseek_fx.record() as rec:
        step(**inputs).loss.backward()
    assert error(grads_of(model), by_reference(before, inputs, rec[0].indices).grads) < TOL


@pytest.mark.usefixtures("process_group")
def test_ddp_in_several_buckets_splits_the_graph_by_default():
    """Dynamo's own optimizer for DDP, which also applies to a module compiled inside."""
    model = zoo.build("llama", vocab=9001, layers=1)
    inputs, before = batch(model), copy.deepcopy(model)
    model.compile(backend="tokenseek", options={**OPTIONS, "strict": False, "inner": "eager"})
    step = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    with pytest.warns(TokenSeekWarning, match=r"DDPOptimizer .*optimize_ddp = False"):
        step(**inputs).loss.backward()
    plain = copy.deepcopy(before)
    plain(**inputs).loss.backward()
    assert error(grads_of(model), grads_of(plain)) < TOL
    model.zero_grad()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False), tokenseek_fx.record() as rec:
        step(**inputs).loss.backward()
    assert error(grads_of(model), by_reference(before, inputs, rec[0].indices).grads) < TOL


# -- losses outside of the graph --------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """What TRL compiles: the rows that have a next token, without the head and the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        hidden = self.model.model(**inputs).last_hidden_state
        return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def shifted_loss(model: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model.lm_head(rows).float(), labels[:, 1:].reshape(-1))


def smoothed_loss(output: Any, labels: Tensor) -> Tensor:
    return LabelSmoother(0.1)(output, labels, shift_labels=True)


@pytest.mark.parametrize("kind", ["hidden rows", "logits"])
def test_a_loss_outside_gets_the_gradient_of_the_kept_rows_at_the_scale_of_all(kind):
    model = llama()
    inputs = batch(model)
    labels = inputs.pop("labels")
    ours, eager = copy.deepcopy(model), copy.deepcopy(model)

    def train(model: nn.Module, call: Callable) -> Tensor:
        output = call(**inputs)
        return shifted_loss(model, output, labels) if kind == "hidden rows" else smoothed_loss(output, labels)

    step = torch.compile(Hidden(ours) if kind == "hidden rows" else ours, backend="tokenseek", options=LOSS_OUTSIDE)
    with tokenseek_fx.record() as rec:
        loss = train(ours, step)
    loss.backward()
    with tokenseek_fx.reference.ditching(model := Hidden(eager) if kind == "hidden rows" else eager, rec[0].indices):
        output = model(**inputs)
    expected = shifted_loss(eager, output, labels) if kind == "hidden rows" else smoothed_loss(output, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    # the head is outside the graph of the hidden rows: it learns from all of them
    assert error(grads_of(ours), grads_of(eager)) < TOL


def test_rows_that_are_not_kept_are_detached_in_an_output_without_a_loss():
    model = llama()
    inputs = batch(model, padding=None)
    del inputs["labels"]
    step = torch.compile(model, backend="tokenseek", options=LOSS_OUTSIDE)
    with tokenseek_fx.record() as rec:
        logits = step(**inputs).logits
    torch.testing.assert_close(logits.detach(), model(**inputs).logits.detach(), rtol=0, atol=1e-6)
    (by_row,) = torch.autograd.grad(logits.sum(), model.lm_head.weight, retain_graph=True)
    kept = logits.gather(1, rec[0].indices[..., None].expand(-1, -1, logits.shape[-1]))
    (by_kept,) = torch.autograd.grad(kept.sum(), model.lm_head.weight)
    torch.testing.assert_close(by_row, by_kept)


# -- batches ----------------------------------------------------------------------------------------------------------


def test_packed_batches():
    """Two documents in every sequence, marked by positions that restart; neither sees the other."""
    model = llama()
    positions = torch.cat([torch.arange(6), torch.arange(T - 6)]).expand(3, T)
    inputs = batch(model, padding=None, position_ids=positions)
    run = assert_matches(model, inputs, TOL)
    alone = model(input_ids=inputs["input_ids"][:, 6:]).logits
    torch.testing.assert_close(run.output.logits[:, 6:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_4_d_masks(kind):
    """A mask of the user, different for every sequence: here a prefix that sees itself."""
    model = llama()
    query, key = torch.arange(T)[:, None], torch.arange(T)
    allowed = torch.stack([(key <= query) | (key < prefix) for prefix in (0, 3, 5)])[:, None]
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).double().masked_fill(~allowed, -1e9)
    inputs = batch(model, padding=None, attention_mask=mask)
    run = assert_matches(model, inputs, TOL)
    assert not torch.allclose(run.output.logits[1], model(inputs["input_ids"]).logits[1]), "the mask is read"


def test_inputs_embeds_with_left_padding_and_adapters():
    model = lora()
    inputs = batch(model, padding="left")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_matches(model, {**inputs, "inputs_embeds": embeds}, TOL)
