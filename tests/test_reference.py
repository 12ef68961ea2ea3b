"""The eager reference compared with the definition, written out by hand."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import zoo

from tokenseek_fx import reference

B, T, D, HEADS, VOCAB = 3, 11, 20, 5, 31
INDICES = torch.tensor([[0, 3, 4, 9], [1, 2, 7, 10], [0, 5, 6, 8]])
ALL = torch.arange(T).expand(B, T)


def selected_rows(indices: Tensor = INDICES, length: int = T) -> Tensor:
    """bool [B, T]."""
    return torch.zeros(len(indices), length, dtype=torch.bool).scatter_(1, indices, True)


def only(selected: Tensor, x: Tensor) -> Tensor:
    """The definition: x [B, T, ..] with the rows outside `selected` detached."""
    return torch.where(selected.view(*selected.shape, *[1] * (x.ndim - 2)), x, x.detach())


class Attention(nn.Module):
    """Causal attention, x [B, T, D] -> [B, T, D]; `ditch` marks where the hand-written definition detaches."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, ditch: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        b, t = x.shape[:2]
        q, k, v = (f(x).view(b, t, HEADS, -1) for f in (self.q, self.k, self.v))
        k, v = ditch(k), ditch(v)
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        if self.style == "sdpa":
            y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True).transpose(1, 2)
        elif self.style == "einsum":
            scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
            y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)
        else:  # heads folded into the batch, as in baddbmm code
            q, k, v = (z.transpose(1, 2).reshape(b * HEADS, t, -1) for z in (q, k, v))
            scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).masked_fill(~causal, -torch.inf)
            y = torch.bmm(F.softmax(scores, -1), v).view(b, HEADS, t, -1).transpose(1, 2)
        return self.o(y.reshape(b, t, -1))


class Tiny(nn.Module):
    """Two blocks, logits [B, T, VOCAB]."""

    def __init__(self, style: str = "sdpa") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.attentions = nn.ModuleList(Attention(style) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D)) for _ in range(2)
        )
        self.double()

    def forward(self, ids: Tensor, ditch: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        x = self.embed(ids) if ids.dtype == torch.int64 else ids
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = ditch(x + attention(x, ditch))
            x = x + mlp(x.view(-1, D)).view(x.shape)
        return ditch(self.head(x))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids and already shifted labels, int64 [B, T], a few of them -100."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(VOCAB, (2, B, T), generator=generator)
    labels[0, :4] = labels[1, 8] = labels[2, 5] = -100
    return ids, labels


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values(), materialize_grads=True), strict=True))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert left.keys() == right.keys()
    assert any(g.abs().max() > 1e-4 for g in right.values())
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def by_hand(model: Tiny, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    value = loss(model(inputs()[0], ditch=lambda x: only(selected_rows(), x)))
    return value, gradients(model, value)


def by_reference(model: Tiny, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    with reference.ditching(model, INDICES):
        value = loss(model(inputs()[0]))
        return value, gradients(model, value)


def kept_mean(logits: Tensor) -> Tensor:
    labels = inputs()[1]
    live = selected_rows() & (labels != -100)
    return -logits.log_softmax(-1)[live].gather(-1, labels[live][:, None]).sum() / live.sum()


def full_cross_entropy(logits: Tensor, **options) -> Tensor:
    return F.cross_entropy(logits.view(-1, VOCAB), inputs()[1].view(-1), **options)


@pytest.mark.parametrize("style", ["sdpa", "einsum", "bmm"])
def test_equals_the_definition_spelled_out(style):
    model = Tiny(style)
    expected, expected_gradients = by_hand(model, kept_mean)
    value, found = by_reference(model, full_cross_entropy)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    assert_same(found, expected_gradients)


def test_forward_values_are_the_ordinary_ones():
    model, (ids, _) = Tiny(), inputs()
    with reference.ditching(model, INDICES):
        ditched = model(ids)
    assert torch.equal(ditched, model(ids))


def test_all_tokens_kept_is_the_ordinary_gradient():
    model = zoo.build("llama")
    batch = zoo.batch(model, B, T, "right")
    expected = gradients(model, model(**batch).loss)
    with reference.ditching(model, ALL):
        assert_same(gradients(model, model(**batch).loss), expected)


CLASS_WEIGHT = torch.linspace(0.5, 2, VOCAB, dtype=torch.float64)


def test_mean_with_class_weights_is_the_weighted_mean_of_the_kept():
    def loss(logits: Tensor) -> Tensor:
        labels = inputs()[1]
        live = selected_rows() & (labels != -100)
        weight = CLASS_WEIGHT[labels[live]]
        return -(weight * logits.log_softmax(-1)[live].gather(-1, labels[live][:, None])[:, 0]).sum() / weight.sum()

    expected, expected_gradients = by_hand(Tiny(), loss)
    value, found = by_reference(Tiny(), lambda logits: full_cross_entropy(logits, weight=CLASS_WEIGHT))
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


def test_sum_is_rescaled_by_labelled_over_kept_labelled():
    labelled = inputs()[1] != -100
    live = labelled & selected_rows()
    expected, expected_gradients = by_hand(Tiny(), lambda logits: kept_mean(logits) * labelled.sum() / 7)
    value, found = by_reference(Tiny(), lambda logits: full_cross_entropy(logits, reduction="sum") / 7)
    assert 0 < live.sum() < labelled.sum()
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


def test_class_dim_second_and_nll_loss_agree_with_flattened_rows():
    _, expected = by_reference(Tiny(), full_cross_entropy)
    labels = inputs()[1]
    assert_same(by_reference(Tiny(), lambda logits: F.cross_entropy(logits.transpose(1, 2), labels))[1], expected)
    log_probs = lambda logits: logits.log_softmax(-1).flatten(0, 1)  # noqa: E731
    assert_same(by_reference(Tiny(), lambda logits: F.nll_loss(log_probs(logits), labels.flatten()))[1], expected)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch 2.11 has no linear_cross_entropy")
def test_linear_cross_entropy_is_linear_then_cross_entropy():
    model, (ids, labels) = Tiny(), inputs()

    def fused(hidden: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden.view(-1, D), model.head.weight, labels.view(-1), linear_bias=model.head.bias
        )

    _, expected = by_reference(model, full_cross_entropy)
    hidden = []
    model.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with reference.ditching(model, INDICES):
        model(ids)
        assert_same(gradients(model, fused(hidden[-1])), expected)


def test_no_reduction_gives_every_row_and_the_gradient_of_the_kept():
    weight = torch.linspace(1, 2, B * T, dtype=torch.float64)
    expected = by_hand(Tiny(), lambda logits: (full_cross_entropy(logits, reduction="none") * weight).sum())
    value, found = by_reference(Tiny(), lambda logits: (full_cross_entropy(logits, reduction="none") * weight).sum())
    torch.testing.assert_close(value, expected[0])
    assert_same(found, expected[1])


@pytest.mark.parametrize("reduce", [Tensor.mean, lambda x: x.sum(1).square().mean(), lambda x: x[:, -1].sum()])
def test_other_reductions_keep_their_value_and_are_not_rescaled(reduce):
    expected, expected_gradients = by_hand(Tiny(), reduce)
    value, found = by_reference(Tiny(), reduce)
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits]
)
def test_regression_is_over_the_kept_at_full_scale(loss, reduction):
    target = torch.rand(B, T, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = T / INDICES.shape[1] if reduction == "sum" else 1

    def kept(logits: Tensor) -> Tensor:
        return loss(logits[selected_rows()], target[selected_rows()], reduction=reduction) * scale

    expected, expected_gradients = by_hand(Tiny(), kept)
    value, found = by_reference(Tiny(), lambda logits: loss(logits, target, reduction=reduction))
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": CLASS_WEIGHT}, {"label_smoothing": 0.1}])
def test_no_kept_label_is_zero_with_zero_gradients(reduction, options):
    model, (ids, labels) = Tiny(), inputs()
    labels = labels.masked_fill(selected_rows(), -100)
    with reference.ditching(model, INDICES):
        loss = F.cross_entropy(model(ids).view(-1, VOCAB), labels.view(-1), reduction=reduction, **options)
        loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_empty_selection_is_zero_too():
    model, (ids, _) = Tiny(), inputs()
    with reference.ditching(model, INDICES[:, :0]):
        loss = F.mse_loss(model(ids), torch.ones(B, T, VOCAB).double())
        loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters())


WEIGHTS = torch.tensor([[1.0, 2.5, 0.5, 3.0], [4.0, 1.0, 1.5, 2.0], [0.25, 1.0, 7.0, 2.0]], dtype=torch.float64)


def by_weighted_reference(
    loss: Callable[[Tensor], Tensor], weights: Tensor = WEIGHTS
) -> tuple[Tensor, dict[str, Tensor]]:
    model = Tiny()
    with reference.ditching(model, INDICES, weights=weights):
        value = loss(model(inputs()[0]))
        return value, gradients(model, value)


def weighted_sum(terms: Tensor) -> Tensor:
    """The sum of w_i times the terms [B, T, ..] of token i over the kept tokens, token by token."""
    return sum(WEIGHTS[b, n] * terms[b, i].sum() for b, row in enumerate(INDICES.tolist()) for n, i in enumerate(row))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": CLASS_WEIGHT}, {"label_smoothing": 0.1}, {"weight": CLASS_WEIGHT, "label_smoothing": 0.1}],
)
def test_weights_estimate_the_loss_of_all_labelled_tokens(reduction, options):
    labels = inputs()[1]
    labelled = labels[labels != -100]
    class_weight = options.get("weight", torch.ones(VOCAB, dtype=torch.float64))
    divisor = class_weight[labelled].sum() if reduction == "mean" else 1

    def estimate(logits: Tensor) -> Tensor:
        return weighted_sum(full_cross_entropy(logits, reduction="none", **options).view(B, T)) / divisor

    expected, expected_gradients = by_hand(Tiny(), estimate)
    value, found = by_weighted_reference(lambda logits: full_cross_entropy(logits, reduction=reduction, **options))
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    assert_same(found, expected_gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits])
def test_weights_of_regression_count_every_element(loss, reduction):
    target = torch.rand(B, T, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    divisor = B * T * VOCAB if reduction == "mean" else 1
    expected, expected_gradients = by_hand(
        Tiny(), lambda logits: weighted_sum(loss(logits, target, reduction="none")) / divisor
    )
    value, found = by_weighted_reference(lambda logits: loss(logits, target, reduction=reduction))
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


def test_weights_of_class_probabilities_count_every_token():
    target = torch.rand(B, T, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    terms = lambda logits: -(target * logits.log_softmax(-1)).sum(-1)  # noqa: E731
    expected, expected_gradients = by_hand(Tiny(), lambda logits: weighted_sum(terms(logits)) / (B * T))
    value, found = by_weighted_reference(lambda logits: F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1)))
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


def test_all_tokens_kept_with_weights_of_one_is_the_ordinary_gradient():
    model, (ids, _) = Tiny(), inputs()
    expected = gradients(model, full_cross_entropy(model(ids)))
    with reference.ditching(model, ALL, weights=torch.ones(B, T)):
        assert_same(gradients(model, full_cross_entropy(model(ids))), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": CLASS_WEIGHT}, {"label_smoothing": 0.1}])
def test_weights_without_any_label_are_zero_with_zero_gradients(reduction, options):
    nothing = torch.full((B * T,), -100)
    loss = lambda logits: F.cross_entropy(logits.view(-1, VOCAB), nothing, reduction=reduction, **options)  # noqa: E731
    value, found = by_weighted_reference(loss)
    assert value == 0
    assert not any(g.any() for g in found.values())


def test_weights_do_not_touch_a_loss_per_instance():
    loss = lambda logits: F.cross_entropy(logits.mean(1), torch.tensor([3, 1, 4]))  # noqa: E731
    expected, expected_gradients = by_hand(Tiny(), loss)
    value, found = by_weighted_reference(loss)
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


@pytest.mark.parametrize("loss", [full_cross_entropy, lambda x, **how: F.mse_loss(x, torch.zeros_like(x), **how)])
def test_weights_have_no_place_in_a_loss_without_reduction(loss):
    with pytest.raises(ValueError, match="can't apply weights"):
        by_weighted_reference(lambda logits: loss(logits, reduction="none").sum())


@pytest.mark.parametrize("weights", [WEIGHTS[:, :3], WEIGHTS.long()])
def test_malformed_weights_raise(weights):
    with pytest.raises(ValueError, match="Expected weights float"):
        by_weighted_reference(full_cross_entropy, weights)


class Block(nn.Module):
    """A pre-norm block; `inner` marks where the definition of a closed block detaches, `outer` where any does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.o, self.mlp = (nn.Linear(D, D) for _ in range(5))

    def forward(self, x: Tensor, inner: Callable = lambda x: x, outer: Callable = lambda x: x) -> Tensor:
        x = outer(x)
        q, k, v = (f(self.norm1(x)).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, inner(k), inner(v), is_causal=True)
        x = x + self.o(outer(y.transpose(1, 2)).flatten(2))
        return outer(x + self.mlp(self.norm2(outer(x))).relu())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, ids: Tensor, **marks: Callable) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, **marks)
        return self.head(x)


def stack_by_reference(weights: Tensor | None = None, **options) -> tuple[Stack, dict[str, Tensor]]:
    model = Stack()
    blocks = options.pop("blocks", lambda model: model.layers)(model)
    with reference.ditching(model, INDICES, open_blocks=blocks, weights=weights):
        return model, gradients(model, full_cross_entropy(model(inputs()[0])))


def test_open_blocks_keep_keys_and_values_of_every_token_live():
    model, found = stack_by_reference()
    logits = model(inputs()[0], outer=lambda x: only(selected_rows(), x))
    assert_same(found, gradients(model, kept_mean(logits)))


def test_in_open_blocks_only_keys_values_and_their_norms_see_more_than_the_kept_rows():
    _, opened = stack_by_reference(blocks=lambda model: model.layers[-1:])
    model, closed = stack_by_reference(blocks=lambda model: [])
    s = selected_rows()
    in_keys_and_out = {"inner": lambda x: x.where(s[:, None, :, None], x.detach()), "outer": lambda x: only(s, x)}
    assert_same(closed, gradients(model, kept_mean(model(inputs()[0], **in_keys_and_out))))
    differ = {name for name in opened if (opened[name] - closed[name]).abs().max() > 1e-9}
    more = {f"layers.2.{part}.{kind}" for part in ("norm1", "k", "v") for kind in ("weight", "bias")}
    assert differ == more


def test_open_blocks_give_the_inputs_rows_outside_the_selection_nothing():
    model, (ids, _) = Stack(), inputs()
    embeds = model.embed(ids).detach().requires_grad_()
    model.embed = nn.Identity()
    with reference.ditching(model, INDICES, open_blocks=model.layers):
        full_cross_entropy(model(embeds)).backward()
    rows = embeds.grad.abs().amax(-1)
    assert not rows[~selected_rows()].any()
    assert (rows[selected_rows()] > 0).all()


def test_open_blocks_with_all_tokens_kept_are_the_ordinary_gradient():
    model, (ids, _) = Stack(), inputs()
    expected = gradients(model, full_cross_entropy(model(ids)))
    with reference.ditching(model, ALL, open_blocks=model.layers):
        assert_same(gradients(model, full_cross_entropy(model(ids))), expected)


def test_open_blocks_and_weights_combine():
    model, found = stack_by_reference(weights=WEIGHTS)
    logits = model(inputs()[0], outer=lambda x: only(selected_rows(), x))
    loss = weighted_sum(full_cross_entropy(logits, reduction="none").view(B, T)) / (inputs()[1] != -100).sum()
    assert_same(found, gradients(model, loss))


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_open_blocks_of_transformers(name, padding):
    """Keys and values, and norms before them, get gradient of all tokens; nothing after the last block does."""
    model = zoo.build(name)
    batch = zoo.batch(model, B, T, padding)
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(name, "model.layers")
    found = []
    for opened in ((), model.get_submodule(blocks)[-1:]):
        with reference.ditching(model, INDICES, open_blocks=opened):
            found.append(gradients(model, model(**batch).loss))
    largest = max(g.abs().max() for g in found[0].values())
    differ = {n for n in found[0] if (found[0][n] - found[1][n]).abs().max() > 1e-6 * largest}
    parts = ("k_proj", "v_proj", "input_layernorm", "c_attn", "ln_1", "query_key_value")
    assert differ and all(f"{blocks}.1." in n and any(part in n for part in parts) for n in differ)


def test_blocks_are_closed_after_the_context():
    model, (ids, _) = Stack(), inputs()
    with reference.ditching(model, INDICES, open_blocks=model.layers):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with reference.ditching(model, INDICES):
        found = gradients(model, full_cross_entropy(model(ids)))
    assert_same(found, stack_by_reference(blocks=lambda model: [])[1])


@pytest.mark.parametrize(("first", "last"), [(0, T - 1), (2, T), (3, 9)])
def test_a_slice_of_logits_keeps_its_token_numbers(first, last):
    labels = inputs()[1].roll(-1, 1)[:, first:last]

    def kept(logits: Tensor) -> Tensor:
        live = selected_rows()[:, first:last] & (labels != -100)
        return F.cross_entropy(logits[:, first:last][live], labels[live])

    def sliced(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[..., first:last, :].contiguous().view(-1, VOCAB), labels.reshape(-1))

    expected, expected_gradients = by_hand(Tiny(), kept)
    value, found = by_reference(Tiny(), sliced)
    torch.testing.assert_close(value, expected)
    assert_same(found, expected_gradients)


def test_a_model_that_slices_its_inputs_is_followed_by_descent():
    class NextToken(Tiny):
        def forward(self, ids: Tensor, ditch: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
            logits = super().forward(ids[:, :-1], ditch)
            return F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="none")

    model, (ids, _) = NextToken(), inputs()
    s = selected_rows()[:, :-1]
    expected = gradients(model, model(ids, lambda x: only(s, x))[s.flatten()].mean())
    with reference.ditching(model, INDICES):
        assert_same(gradients(model, model(ids).sum() / s.sum()), expected)


def test_a_loss_per_instance_is_not_a_loss_over_tokens():
    classes = torch.tensor([3, 1, 4])
    for pool in (lambda logits: logits.mean(1), lambda logits: logits[:, -1]):
        loss = lambda logits, pool=pool: F.cross_entropy(pool(logits), classes)  # noqa: E731
        expected, expected_gradients = by_hand(Tiny(), loss)
        value, found = by_reference(Tiny(), loss)
        torch.testing.assert_close(value, expected)
        assert_same(found, expected_gradients)


def test_input_gradient_is_zero_exactly_outside_the_selection():
    model, (ids, _) = Tiny(), inputs()
    embeds = model.embed(ids).detach().requires_grad_()
    with reference.ditching(model, INDICES):
        full_cross_entropy(model(embeds)).backward()
    rows = embeds.grad.abs().amax(-1)
    assert not rows[~selected_rows()].any()
    # instance 0 has no label on its first four positions, and those feed later kept ones through keys and values
    assert (rows[selected_rows()] > 0).all()


def test_in_place_writes_keep_their_meaning():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(D, D), nn.Parameter(torch.rand(D))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(F.dropout(self.linear(x), 0.0, inplace=True), inplace=True) + 1
            y += x
            y[:, 2:5].mul_(self.scale)
            return y.cumsum(1)

    torch.manual_seed(0)
    model, x, s = InPlace().double(), torch.randn(B, T, D).double(), selected_rows()
    with reference.ditching(model, INDICES):
        out = model(x)
        found = gradients(model, out.square().sum())
    assert torch.equal(out, model(x))
    y = model.linear(x).relu() + 1 + x
    y = torch.cat([y[:, :2], y[:, 2:5] * model.scale, y[:, 5:]], 1)
    assert_same(found, gradients(model, only(s, only(s, y).cumsum(1)).square().sum()), atol=1e-9)


def test_the_output_of_a_custom_function_is_masked_where_it_is_used():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad * weight, (grad * x).sum((0, 1))

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(D).double())

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(x, self.weight).cumsum(1)

    model, x, s = Custom(), torch.randn(B, T, D).double(), selected_rows()
    with reference.ditching(model, INDICES):
        found = gradients(model, model(x).square().sum())
    expected = gradients(model, only(s, only(s, x * model.weight).cumsum(1)).square().sum())
    assert_same(found, expected, atol=1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_transformer_encoder_against_hand_masking(batch_first, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, 24, 0.0, batch_first=batch_first, norm_first=norm_first)
    model, s = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double(), selected_rows()
    x = torch.randn(B, T, D).double()
    target = torch.randn(B, T, D).double()

    def attention(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        q, k, v = (z.view(B, T, HEADS, -1).transpose(1, 2) for z in (q, only(s, k), only(s, v)))
        y = (q @ k.transpose(2, 3) / (D // HEADS) ** 0.5).softmax(-1) @ v
        return module.out_proj(y.transpose(1, 2).reshape(B, T, D))

    h = x
    for block in model.layers:
        feed = lambda z, block=block: block.linear2(block.linear1(z).relu())  # noqa: E731
        if norm_first:
            h = only(s, h + attention(block.self_attn, block.norm1(h)))
            h = h + feed(block.norm2(h))
        else:
            h = block.norm1(only(s, h + attention(block.self_attn, h)))
            h = block.norm2(h + feed(h))
    expected = gradients(model, ((h - target).square() * s[..., None]).sum() / (s.sum() * D))
    swap = (lambda z: z) if batch_first else (lambda z: z.transpose(0, 1))
    with reference.ditching(model, INDICES):
        loss = F.mse_loss(model(swap(x)), swap(target))
        assert_same(gradients(model, loss), expected)


def test_multi_head_attention_that_returns_its_weights():
    torch.manual_seed(0)
    x = torch.randn(B, T, D).double()
    model = nn.MultiheadAttention(D, HEADS, batch_first=True).double()
    results = []
    for need_weights in (True, False):
        with reference.ditching(model, INDICES):
            results.append(gradients(model, model(x, x, x, need_weights=need_weights)[0].square().sum()))
    assert_same(*results)


class Odd(nn.Module):
    """A linear of D features, then `body`."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.body = nn.Linear(D, 2 * T).double(), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.linear(x))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: x.view(B, T, 2, T), "has a new dim of size 11"),
        (lambda x: x.view(B, T, T, 2).transpose(1, 2), "has a new dim of size 11"),
        (lambda x: x.chunk(2, -1)[0], "has a new dim of size 11"),
        (lambda x: x[..., :T], "has a new dim of size 11"),
        (
            lambda x: torch.cat([x, x[:, :1].detach() * 0, torch.zeros(B, 1, 2 * T)], 1),
            "Pass the size of the joined axis, or of the tokens alone, as length=",
        ),
        (lambda x: x[:, 1:] - x[:, :-1], "rows of different tokens"),
        (lambda x: torch.einsum("bid,bjd->bji", x, x.clone()).softmax(1), "Write the scores as"),
        (lambda x: F.kl_div(x, x.detach(), reduction="sum"), "is not defined here"),
    ],
)
def test_ambiguous_axes_raise(body, message):
    model = Odd(body)
    with pytest.raises(ValueError, match=message), reference.ditching(model, INDICES):
        model(torch.randn(B, T, D).double())


class Moves(nn.Module):
    """Two layers and what moves, mixes or joins rows between them; ``cut(value, tokens)`` marks the definition.

    ``tokens``: the token of each position, -1 for none.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.both = nn.Linear(D, D), nn.Linear(D, VOCAB), nn.Linear(2 * D, D)
        self.conv, self.prefix = nn.Conv1d(D, D, 4), nn.Parameter(torch.randn(1, 2, D))
        self.double()

    def forward(self, x: Tensor, body: Callable, cut: Callable = lambda x, tokens: x) -> Tensor:
        return body(self, cut(self.first(x), range(T)), cut)


def cut_by_tokens(x: Tensor, tokens) -> Tensor:
    """The definition: x [B, n, ..] with the rows of tokens outside the selection detached."""
    kept = torch.cat([selected_rows(), torch.ones(B, 1, dtype=torch.bool)], 1)
    return only(kept[:, list(tokens)], x)


def causal(m: Moves, x: Tensor) -> Tensor:
    return m.conv(F.pad(x.mT, (3, 0))).mT


def written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


BACK, SHIFTED = range(T - 1, -1, -1), [-1, *range(T - 1)]
PAIRS = torch.arange(B)[:, None]
#: body(model, x, cut) for every kind of move and mixing.
BODIES = {
    "slice": lambda m, x, cut: cut(m.last(x[:, 2:]), range(2, T)),
    "narrow, then slice": lambda m, x, cut: cut(m.last(x.narrow(1, 1, 8)[:, -3:]), range(6, 9)),
    "every third": lambda m, x, cut: cut(m.last(x[:, 1::3]), range(1, T, 3)),
    "split": lambda m, x, cut: cut(m.last(x.split([4, 7], 1)[1]), range(4, T)),
    "flip": lambda m, x, cut: cut(m.last(x.flip(1)), BACK),
    "roll": lambda m, x, cut: cut(m.last(x.roll(2, 1)), [9, 10, *range(9)]),
    "padded and sliced": lambda m, x, cut: cut(m.last(F.pad(x, (0, 0, 1, 0))[:, :-1]), SHIFTED),
    "written": lambda m, x, cut: cut(m.last(written(x)), SHIFTED),
    "index_select": lambda m, x, cut: cut(m.last(x.index_select(1, torch.tensor(BACK))), BACK),
    "pairs of indices": lambda m, x, cut: cut(m.last(x[PAIRS, torch.tensor(BACK)[None]]), BACK),
    "prefix": lambda m, x, cut: cut(m.last(torch.cat([m.prefix.expand(B, -1, -1), x], 1)), [-1, -1, *range(T)]),
    "halves exchanged": lambda m, x, cut: cut(m.last(torch.cat([x[:, 5:], x[:, :5]], 1)), [*range(5, T), *range(5)]),
    "sum of different rows": lambda m, x, cut: cut(m.last(cut(x * x.roll(1, 1), range(T))), range(T)),
    "features of different rows": lambda m, x, cut: cut(m.both(torch.cat([x, written(x)], -1)), range(T)),
    "convolution": lambda m, x, cut: cut(m.last(cut(causal(m, x), range(T))), range(T)),
    "convolution, sliced": lambda m, x, cut: cut(
        m.last(cut(F.conv1d(x.mT, m.conv.weight, m.conv.bias, padding=3)[..., :T].mT, range(T))), range(T)
    ),
    "convolution of moved rows": lambda m, x, cut: cut(causal(m, cut(x.flip(1).tanh(), BACK)), range(T)),
    "cumulative sum of moved rows": lambda m, x, cut: cut(
        cut(x.roll(1, 1).tanh(), [10, *range(10)]).cumsum(1), range(T)
    ),
    "shorter convolution": lambda m, x, cut: m.last(m.conv(x.mT).mT),
    "pooled, then upsampled": lambda m, x, cut: cut(
        F.interpolate(m.last(F.avg_pool1d(x.mT, 2, ceil_mode=True).mT).mT, size=T).mT, range(T)
    ),
    "matrix": lambda m, x, cut: cut(torch.ones(T, T).double().tril() @ x.tanh(), range(T)),
    "queries moved": lambda m, x, cut: cut(F.scaled_dot_product_attention(x.flip(1), x, x), BACK),
    "keys moved": lambda m, x, cut: cut(F.scaled_dot_product_attention(x, cut(x.flip(1).tanh(), BACK), x), range(T)),
}


@pytest.mark.parametrize("name", BODIES)
def test_rows_keep_their_tokens_through_moves_and_are_those_that_stand_there_behind_mixing(name):
    model, x = Moves(), torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).double()
    expected = gradients(model, model(x, BODIES[name], cut_by_tokens).square().sum())
    with reference.ditching(model, INDICES, length=T):
        assert_same(gradients(model, model(x, BODIES[name]).square().sum()), expected, atol=1e-9)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.l1_loss])
def test_a_loss_over_moved_rows_is_that_of_the_kept_ones(loss, reduction, weights):
    """Two prefix tokens, which belong to no token and count as kept with weight 1, and the tokens 3 .. 10."""
    model, x = Moves(), torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).double()
    tokens, labelled = [-1, -1, *range(3, T)], torch.ones(B, T - 1, dtype=torch.bool)
    labels = loss is F.cross_entropy
    target = torch.randint(VOCAB, (B, T - 1)) if labels else torch.randn(B, T - 1, VOCAB).double()
    if labels:
        target[0, 3:7], labelled[0, 3:7] = -100, False

    def body(m: Moves, x: Tensor, cut: Callable) -> Tensor:
        return cut(m.last(torch.cat([m.prefix.expand(B, -1, -1), x[:, 3:]], 1)), tokens)

    def of(logits: Tensor, **how: str) -> Tensor:
        return loss(logits.mT if labels else logits, target, **how)

    kept = torch.cat([selected_rows(), torch.ones(B, 1, dtype=torch.bool)], 1)[:, tokens] & labelled
    factor = torch.ones(B, T + 1).double()
    if weights is not None:
        factor[:, :T] = factor[:, :T].scatter(1, INDICES, weights)
    elif reduction == "sum":
        factor = factor * labelled.sum() / kept.sum()
    terms = of(model(x, body, cut_by_tokens), reduction="none")
    terms = terms if labels else terms.sum(-1)
    total = (factor[:, tokens] * terms)[kept].sum()
    entries = 1 if labels else VOCAB
    divisor = entries * (kept if weights is None else labelled).sum() if reduction == "mean" else 1
    expected = gradients(model, total / divisor)
    with reference.ditching(model, INDICES, length=T, weights=weights):
        value = of(model(x, body), reduction=reduction)
        torch.testing.assert_close(value, total / divisor)
        assert_same(gradients(model, value), expected)


def test_patches_as_an_image_and_merged_sequences_keep_their_tokens():
    """Six patches of 2 x 2 pixels, whose pixels are those of their token; five passages of two tokens as one."""
    model, x, y = nn.Linear(D, 4).double(), torch.randn(B, 6, D).double(), torch.randn(B, 4, 6).double()
    image = lambda z: z.view(-1, 2, 3, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4, 6)  # noqa: E731
    indices = torch.tensor([[0, 2], [1, 5], [0, 4]])
    kept = image(selected_rows(indices, 6)[..., None].expand(-1, -1, 4))
    expected = gradients(model, (image(model(x)) - y)[kept].square().mean())
    with reference.ditching(model, indices, length=6):
        assert_same(gradients(model, F.mse_loss(image(model(x)), y)), expected)

    model, x, indices = Moves(), torch.randn(B * 5, 2, D).double(), INDICES[:, :3]
    kept = selected_rows(indices, 10)
    merge = lambda m, z, cut: m.last(z.reshape(B, 10, D))  # noqa: E731
    merged = only(kept, model(x, merge, lambda z, tokens: only(kept.view(B * 5, 2), z)))
    expected = gradients(model, merged.square().sum())
    with reference.ditching(model, indices, length=10):
        assert_same(gradients(model, model(x, merge).square().sum()), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("indices", "length", "message"),
    [
        (INDICES, D, "Parameter .* has a dim of size T = .* Use another length for the check"),
        (INDICES, B, "Use another length for the check|select position"),
        (INDICES, 5, "indices select position 10"),
        (INDICES.flip(1), T, "strictly increasing"),
        (INDICES.int(), T, "int64"),
        (torch.arange(4).expand(HEADS * 4, 4), T, "Use another batch size for the check"),
    ],
)
def test_sizes_that_could_be_mistaken_raise(indices, length, message):
    model = Tiny()
    with pytest.raises(ValueError, match=message), reference.ditching(model, indices):
        model(torch.zeros(len(indices), length, dtype=torch.int64))


def test_gradient_checkpointing_raises():
    model = zoo.build("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Switch gradient checkpointing off"), reference.ditching(model, INDICES):
        model(**zoo.batch(model, B, T))


def test_a_batch_that_equals_the_number_of_heads_is_recognised_by_descent():
    """B = 2 = key/value heads, and one instance at a time (B = 1) adds up to the same gradients."""
    model = zoo.build("llama", attn="eager")
    batch = zoo.batch(model, 2, T)
    with reference.ditching(model, INDICES[:2]):
        together = gradients(model, model(**batch, num_items_in_batch=1).loss)
    apart = []
    labelled, live = _labelled(batch["labels"], INDICES[:2])
    for b in range(2):
        with reference.ditching(model, INDICES[b : b + 1]):
            loss = model(**{k: v[b : b + 1] for k, v in batch.items()}, num_items_in_batch=1).loss
            apart.append(gradients(model, loss * live[b] / labelled[b] * labelled.sum() / live.sum()))
    assert_same(together, {name: apart[0][name] + apart[1][name] for name in together}, atol=1e-4)


def _labelled(labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Labelled and kept labelled positions of each instance, of labels shifted as transformers does."""
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:] != -100
    return shifted.sum(1), (shifted & selected_rows(indices)).sum(1)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_sdpa_and_eager_of_every_family_agree(name, adapter, padding):
    found = []
    for attn in ("sdpa", "eager"):
        dtype = torch.float32 if padding == "left" else torch.float64
        model = zoo.build(name, attn, dtype)
        model = zoo.lora(model) if adapter else model
        batch = zoo.batch(model, B, T, padding)
        with reference.ditching(model, INDICES):
            out = model(**batch)
            out.loss.backward()
        assert torch.equal(out.logits, model(**batch).logits)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert all(p.grad.any() for n, p in model.named_parameters() if p.requires_grad and "k_proj.bias" not in n)
    assert found[0].isfinite().all()
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_embedding_rows_outside_the_selection_get_nothing(name):
    model = zoo.build(name)
    batch = zoo.batch(model, B, T)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    with reference.ditching(model, INDICES):
        model(inputs_embeds=embeds, **batch).loss.backward()
    rows = embeds.grad.abs().amax(-1)
    assert not rows[~selected_rows()].any()
    assert (rows[selected_rows()] > 0).sum() >= INDICES.numel() - B  # the last kept row may have no label


class CrossAttention(nn.Module):
    """Two token axes: the keys of one sequence, the queries of another; ``only`` detaches as the definition does."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, memory, labels, only=lambda value, axis: value):
        query, key, value = only(self.q(x), 0), only(self.k(memory), 1), only(self.v(memory), 1)
        attended = only((query @ key.transpose(-1, -2)).softmax(-1) @ value, 0)
        return nn.functional.cross_entropy(only(self.out(attended), 0).flatten(0, 1), labels.flatten())


def test_two_axes_have_a_selection_each():
    torch.manual_seed(0)
    model, x, memory = CrossAttention().double(), torch.randn(3, 11, 8).double(), torch.randn(3, 13, 8).double()
    labels = torch.randint(8, (3, 11))
    kept = [torch.rand(3, size).argsort(1)[:, :4].sort(1).values for size in (11, 13)]
    with reference.ditching(model, kept[0], length=11, others={13: kept[1]}):
        model(x, memory, labels).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    masks = [torch.zeros(3, size).scatter(1, rows, 1).bool() for size, rows in zip((11, 13), kept, strict=True)]
    cut = torch.where(masks[0], labels, -100)
    model(x, memory, cut, lambda y, axis: torch.where(masks[axis].unsqueeze(-1), y, y.detach())).backward()
    torch.testing.assert_close(grads, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-12, atol=1e-14)


def test_two_axes_of_one_length_are_ambiguous():
    model, x = CrossAttention(), torch.randn(3, 11, 8)
    rows = torch.arange(4).expand(3, 4)
    ditching = reference.ditching(model, rows, length=11, others={11: rows})
    with pytest.raises(ValueError, match="Two token axes have 11 tokens"), ditching:
        model(x, x, torch.zeros(3, 11, dtype=torch.int64))
