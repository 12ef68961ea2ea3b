"""The eager definition of token ditching: slow, simple, and independent of all graph passes.

    with reference.ditching(model, indices):
        loss = model(**batch).loss
        loss.backward()

``indices[b]`` lists the kept tokens of instance b. The forward is unchanged. The gradient of every activation row
outside the selection is zero, as if ``torch.where(selected, x, x.detach())`` followed every operation; here gradient
hooks do this, so that views and in-place writes keep their meaning. A torch loss over tokens becomes the loss of the
kept labelled tokens at the scale of the full loss or, with ``weights``, an estimate of the full loss. Blocks in
``open_blocks`` keep the keys and values of all tokens live.

The token of each entry of a value is its row number, which is determined in two ways:

- by descent: a move (a view, a slice, a flip, padding, a join, indexing) is replayed on the row numbers of its source,
  where -1 stands for no token. Any other operation keeps the rows of an operand if every entry of the result depends,
  of this operand, on its own row alone: rows are set to NaN to see how far they reach;
- by size, for what an operation mixes, for operands with different rows, and for inputs: the dim of size T is the token
  axis with position i = token i, the dim of size B is the batch. So T and B must be distinctive numbers. A result of
  mixing with another number of positions has no rows, nor have the scores [.., 1, T] of a single query.

Shapes that could be read in several ways are errors, and so are different rows that are combined into a value without a
dim of size T.

Not covered: reentrant gradient checkpointing, token mixing inside a custom ``autograd.Function`` (its inputs and
outputs are covered), multi-layer ``nn.LSTM``/``nn.GRU`` (one call is one operation), and attention scores whose keys
come before their queries: a softmax over these is an error, other scores must be written as [.., queries, keys]. A
token axis without a selection is left unchanged.
"""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

Function = Callable[..., Any]

_JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_BROADCASTS = {torch.broadcast_to, Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.tile, Tensor.tile}
# fmt: off
_MOVE_NAMES = (
    "view", "reshape", "view_as", "reshape_as", "permute", "transpose", "t", "movedim", "moveaxis", "swapaxes",
    "swapdims", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to",
    "repeat", "repeat_interleave", "tile", "chunk", "split", "tensor_split", "unbind", "narrow", "select",
    "index_select", "take_along_dim", "gather", "masked_select", "diagonal", "unfold", "contiguous", "clone",
    "__getitem__", "flip", "fliplr", "flipud", "roll", "rot90",
)
_UNDEFINED_LOSS_NAMES = (
    "kl_div", "ctc_loss", "gaussian_nll_loss", "hinge_embedding_loss", "cosine_embedding_loss", "margin_ranking_loss",
    "multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss", "poisson_nll_loss",
    "soft_margin_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss",
)
# fmt: on
_MOVES = {getattr(owner, name) for owner in (torch, Tensor) for name in _MOVE_NAMES if hasattr(owner, name)}
_PAD = torch._C._nn.pad
_PADS = {_PAD, torch.constant_pad_nd}
_MOVES |= {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__} | _JOINS | _PADS
#: Writes of one operand into another, which keeps its rows elsewhere.
_WRITES = {Tensor.__setitem__, torch.slice_scatter, torch.select_scatter, Tensor.slice_scatter, Tensor.select_scatter}
_RESHAPES_IN_PLACE = {
    getattr(Tensor, f"{name}_") for name in ("transpose", "t", "squeeze", "unsqueeze", "swapaxes", "swapdims", "resize")
}
_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_PRODUCTS = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.baddbmm,
    Tensor.baddbmm, torch.einsum,
}  # fmt: skip
_SOFTMAX = {torch.softmax, Tensor.softmax, torch.log_softmax, Tensor.log_softmax}
_OPAQUE = {
    Tensor.backward, Tensor.register_hook, Tensor.retain_grad, Tensor.detach, Tensor.requires_grad_, Tensor.__repr__,
    torch.autograd.grad, torch.autograd.backward, Tensor.register_post_accumulate_grad_hook,
}  # fmt: skip

_CLASS_LOSSES = {F.cross_entropy, F.nll_loss}
_ELEMENT_LOSSES = {
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
}  # fmt: skip
_MEAN_DIVIDES_BY_WEIGHT = {F.mse_loss, F.l1_loss, F.huber_loss}
_LINEAR_CROSS_ENTROPY = getattr(F, "linear_cross_entropy", None)
_UNDEFINED_LOSSES = {getattr(F, name) for name in _UNDEFINED_LOSS_NAMES}


@contextmanager
def ditching(
    model: Callable[..., Any],
    indices: Tensor,
    length: int | None = None,
    weights: Tensor | None = None,
    open_blocks: Iterable[nn.Module] = (),
    others: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Give every forward of `model` inside the context the gradient of token ditching.

    Let l_i be the loss term of token i with reduction="none", S the kept tokens and L the labelled tokens (all entries,
    if a loss has no labels). A loss over tokens becomes

    - mean: the sum of l_i over S and L, divided by |S and L|; with `weights` w: the sum of w_i l_i over S and L,
      divided by |L|
    - sum: the sum of l_i over S and L, times |L| / |S and L|; with `weights` w: the sum of w_i l_i over S and L

    A class-weighted mean counts each token by its class weight. A sum over no token is 0, with gradients 0. With
    w_i = 1 / P(i in S), the expectation of the weighted loss is the full loss. Reductions other than torch losses, and
    losses per instance, are neither rescaled nor weighted.

    An open block b computes ``only(b(only(x)))`` with ``only(x) = torch.where(selected, x, x.detach())``, without cuts
    inside. It should be a residual block with one attention. Then no gradient enters its queries, MLP and output in
    rows outside S, but gradient does enter the projections of all keys and values and the norms before them, and ends
    at the block's input. (Between two attentions of one open block, gradient would pass through such rows.)

    Args:
        model: an eager module (or any callable, if `length` is given).
        indices: int64 [B, k], the kept positions of each instance, strictly increasing.
        length: T, the size of the token axis. Default: that of the first [B, T], [B, T, D] or [T, B, D] tensor among
            the model's inputs. Required if the model builds the axis itself (patches, a class token).
        weights: float [B, k], one factor for the loss term of each kept token.
        open_blocks: modules without cuts inside, for instance ``model.model.layers``: this is ``kv_grad="all"``.
        others: int64 [B, k] kept positions of further token axes, by their length (the encoder's tokens of an
            encoder-decoder); B is the batch of that axis.

    Raises:
        ValueError: `indices` or `weights` is malformed; another dim has size T or B; rows of different tokens are
            combined into a value without a dim of size T; gradient checkpointing is on; `weights` are given and a loss
            has reduction="none", which can't apply them.

    >>> with ditching(model, torch.tensor([[0, 3, 4]])):
    ...     model(input_ids=ids, labels=ids).loss.backward()
    """
    if length is None and not isinstance(model, nn.Module):
        raise ValueError("The token axis of a plain callable can't be read from its inputs. Pass length=T.")
    mode = _Ditching(model, _checked(indices), length, _checked_weights(weights, indices))
    mode.others = {size: _checked(kept) for size, kept in (others or {}).items()}
    handles = [hook for block in open_blocks for hook in mode.open(block)]
    if isinstance(model, nn.Module):
        handles.append(model.register_forward_pre_hook(mode.start_forward, prepend=True, with_kwargs=True))
    else:
        mode.start(length)
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Ditching(TorchFunctionMode):
    """Runs every torch function unchanged, and hooks the gradients of its operands and results."""

    def __init__(
        self, model: Callable[..., Any], indices: Tensor, length: int | None, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model, self.indices, self.given_length, self.weights = model, indices, length, weights
        self.batch, self.length = indices.shape[0], 0
        self.batches: dict[int, int] = {}
        self.others: dict[int, Tensor] = {}
        self.firsts: dict[int, int] = {}
        self.keep = torch.empty(0, dtype=torch.bool)
        self.factors: Tensor | None = None
        self.rows = WeakTensorKeyDictionary()
        self.started: set[int] = set()
        self.inside = 0

    # ---- the start of a forward: determine T

    def start_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: sets T, and replaces every leaf input that requires grad by a view, which can be hooked."""
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in module.modules()):
            raise ValueError("The reference can't see inside checkpointed blocks. Switch gradient checkpointing off.")
        self.start(self.given_length or _length_of([*args, *kwargs.values()], self.batch))
        return tuple(map(_view_of_leaf, args)), {name: _view_of_leaf(value) for name, value in kwargs.items()}

    def start(self, length: int) -> None:
        """Set T = `length` and reset the state of the previous forward; ValueError if another dim has size T or B."""
        if length in self.others:
            raise ValueError(f"Two token axes have {length} tokens. {_REMEDY}.")
        named = self.model.named_parameters() if isinstance(self.model, nn.Module) else ()
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        self.length, self.rows, self.inside, self.started = length, WeakTensorKeyDictionary(), 0, set[int]()
        kept = []
        for size, indices in {length: self.indices, **self.others}.items():
            self._check_axis(size, indices, shapes)
            self.firsts[size], self.batches[size] = sum(map(torch.numel, kept)), len(indices)
            none = torch.zeros(len(indices), size, dtype=torch.bool, device=indices.device)
            kept.append(none.scatter_(1, indices, True).flatten())
        no_token = self.indices.new_ones(1)  # the last entry, which -1 finds: always kept, with weight 1
        self.keep = torch.cat([*kept, no_token.bool()])
        if self.weights is not None:
            table = self.weights.new_zeros(self.batch, length).scatter(1, self.indices, self.weights).flatten()
            self.factors = torch.cat([table, no_token.to(table.dtype)])

    def _check_axis(self, length: int, indices: Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        if indices.numel() and int(indices.max()) >= length:
            raise ValueError(
                f"indices select position {int(indices.max())}, but a sequence has {length} tokens. "
                "Positions count from 0."
            )
        if length in (1, len(indices)):
            raise ValueError(f"A token axis of size {length} can't be distinguished from the batch. {_REMEDY}.")
        for name, shape in shapes.items():
            self._check_parameter(name, shape, length)

    def _check_parameter(self, name: str, shape: tuple[int, ...], length: int) -> None:
        table = [*shape[-3:-2], *shape[-2:-1]] in (
            [1, length],
            [length],
        )  # [1, T, D], or [T, D] with a name of positions
        position_table = shape.count(length) == 1 and table and (len(shape) == 3 or "pos" in name)
        if length in shape and not position_table:
            raise ValueError(f"Parameter {name} {list(shape)} has a dim of size T = {length}. {_REMEDY}.")
        if self.batch > 1 and self.batch in shape:
            raise ValueError(
                f"Parameter {name} {list(shape)} has a dim of the batch size {self.batch}. "
                "Use another batch size for the check."
            )

    # ---- open blocks: no cuts inside

    def open(self, block: nn.Module) -> list[RemovableHandle]:
        """Hooks that cut the gradient at the inputs and outputs of `block`, and nowhere inside."""
        enter = block.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        return [enter, block.register_forward_hook(self._leave)]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        with torch._C.DisableTorchFunction():
            self._meet_all((args, kwargs))
        self.inside += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside -= 1
        with torch._C.DisableTorchFunction():
            self._meet_all(output)

    # ---- every torch function

    def __torch_function__(self, func: Function, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run `func`; zero the gradient of its floating-point operands and results in rows outside the selection."""
        kwargs = kwargs or {}
        if not self.length or _is_opaque(func):
            return func(*args, **kwargs)
        if func is _LINEAR_CROSS_ENTROPY:
            return self._linear_cross_entropy(*args, **kwargs)
        if func in _CLASS_LOSSES or func in _ELEMENT_LOSSES or func in _UNDEFINED_LOSSES:
            return self._loss(func, args, kwargs)
        if _is_composite(func):
            return self._see_inside(func, args, kwargs)
        operands = self._meet_all((args, kwargs))
        live = frozenset(id(x) for x in operands if x.requires_grad)
        self._check_softmax(func, args, kwargs)
        if func in _RESHAPES_IN_PLACE:
            self.rows.pop(args[0], None)
        out = func(*args, **kwargs)
        self._place(_Call(func, args, kwargs, operands, live), out)
        return out

    def _see_inside(self, func: Function, args: tuple, kwargs: dict) -> Any:
        """Run the Python body of a torch.nn.functional composite under this mode, so that its steps are hooked."""
        no = dict.fromkeys(_DISPATCH_CHECKS, lambda *_: False)
        body = types.FunctionType(func.__code__, {**func.__globals__, **no}, func.__name__, func.__defaults__)
        body.__kwdefaults__ = func.__kwdefaults__
        with self:
            return body(*args, **kwargs)

    def _meet_all(self, values: Any) -> list[Tensor]:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        for x in tensors:
            self._meet(x)
        return tensors

    def _meet(self, x: Tensor) -> None:
        """Hook an operand: one that is new (an input, a custom function's output) or was modified in place."""
        if x not in self.rows:
            self._record(x, self._by_position(x))
        else:
            self._hook(x)

    def _place(self, call: "_Call", out: Any) -> None:
        """Determine the rows of every tensor in `out`, and hook it."""
        if call.func is Tensor.__setitem__:
            self._record(call.args[0], self._written(call))
            return
        results = [y for y in tree_leaves(out) if isinstance(y, Tensor)]
        moved = self._move(call, results) if call.func in _MOVES else [None] * len(results)
        for number, (y, rows) in enumerate(zip(results, moved, strict=True)):
            if rows is None and call.func in _WRITES:
                rows = self._written(call)
            if rows is None and (call.func not in _MOVES or call.func in _JOINS):
                rows = self._inherit(call, number, y)
            if rows is None and self._scores_one_query(call, y):
                rows = torch.full(y.shape, -1, device=y.device)
            rows = self._by_position(y) if rows is None else rows
            if rows is None:
                self._check_lost(call, y)
            self._record(y, rows)

    def _scores_one_query(self, call: "_Call", y: Tensor) -> bool:
        """True for the scores [.., 1, T] of a query that is no token: the tokens are its keys, as in attention."""
        return call.func in _PRODUCTS and y.shape[-2:-1] == (1,) and y.shape[-1] in self.firsts

    def _record(self, y: Tensor, rows: Tensor | None) -> None:
        if rows is not None:
            self.rows[y] = rows
            if y.requires_grad:
                self.started |= {*y.shape} & {*self.firsts}
            self._hook(y)

    def _hook(self, y: Tensor) -> None:
        """Zero the gradient of `y` outside the selection, once per autograd node and output (not in open blocks)."""
        if self.inside or not y.requires_grad or y.grad_fn is None:
            return
        key = ("ditched", id(self), y.output_nr)
        if key not in y.grad_fn.metadata:  # type: ignore[operator]
            y.grad_fn.metadata[key] = True
            kept = self._kept(self.rows[y])
            y.register_hook(lambda grad: grad if grad is None else torch.where(kept, grad, torch.zeros_like(grad)))

    def _kept(self, rows: Tensor) -> Tensor:
        return self.keep.to(rows.device)[rows]

    def _factors(self, rows: Tensor) -> Tensor | None:
        if self.factors is None:
            return None
        if rows.numel() and int(rows.max()) >= len(self.factors) - 1:
            raise ValueError("A loss runs over another token axis than that of the weights.")
        return self.factors.to(rows.device)[rows]

    # ---- the token of a row: row number b * T + t for every entry of a value, continued over the token axes

    def _by_size(self, y: Tensor) -> list[Tensor]:
        """The rows of `y` for each reading of its shape as one batch dim and one token dim, earlier dims first."""
        found = []
        for token_dim, length in enumerate(y.shape):
            if length in self.firsts:
                batch = self.batches[length]
                dims = [None] if batch == 1 else [dim for dim, size in enumerate(y.shape) if size == batch]
                found += [(dim, self._numbered(y, dim, token_dim)) for dim in dims]
        return [rows for _, rows in sorted(found, key=lambda reading: reading[0] or 0)]

    def _numbered(self, y: Tensor, batch_dim: int | None, token_dim: int) -> Tensor:
        length = y.shape[token_dim]
        rows = self.firsts[length] + _along(torch.arange(length, device=y.device), token_dim, y.ndim)
        if batch_dim is not None:
            rows = rows + length * _along(torch.arange(self.batches[length], device=y.device), batch_dim, y.ndim)
        return rows.expand(y.shape)

    def _tokens_in(self, shape: Iterable[int]) -> int:
        """The number of dims with the size of a token axis."""
        return sum(size in self.firsts for size in shape)

    def _by_position(self, y: Tensor) -> Tensor | None:
        """The rows of `y` by size; None if it has no token axis; ValueError if it could have several."""
        readings = self._by_size(y)
        if len(readings) > 1:
            score_matrix = self._tokens_in(y.shape) == len(readings) == 2  # [.., T, T]: rows are queries
            if not score_matrix and y.requires_grad:
                raise ValueError(
                    f"A value of shape {list(y.shape)} has several dims of the batch size {self.batch} or of "
                    f"{self.length} tokens. {_REMEDY}, or another batch size."
                )
            return readings[0] if score_matrix else None
        return next(iter(readings), None)

    # ---- moves: the same operation on row numbers

    def _move(self, call: "_Call", results: list[Tensor]) -> list[Tensor | None]:
        """Replay a move on the row numbers of its source; None where these are unknown."""
        unknown: list[Tensor | None] = [None] * len(results)
        if any(isinstance(a, torch.dtype) for a in tree_leaves((call.args, call.kwargs))):
            return unknown
        sources = call.sources
        known = [self.rows.get(x) for x in sources]
        if all(rows is None for rows in known):
            self._check_born(call.func, sources, results)
            return unknown
        if call.func in _JOINS:
            return [None if self._starts_axis(sources, results[0]) else self._join(call, sources, results[0])]
        numbers = known[0].contiguous()  # type: ignore[union-attr]
        moved = self._pad(call, numbers) if call.func in _PADS else call.on(numbers)
        rows = [r for r in tree_leaves(moved) if isinstance(r, Tensor)]
        for y, descent in zip(results, rows, strict=True):
            self._check_grown(call.func, sources, y, descent)
        return [None if self._starts_axis(sources, y) else descent for y, descent in zip(results, rows, strict=True)]

    def _starts_axis(self, sources: list[Tensor], y: Tensor) -> bool:
        """True for a move whose result is that of another token axis, which has a selection of its own.

        It has the size of an axis that no value had before, or joins rows of several axes.
        """
        owners = {size for x in sources if x in self.rows for size in self._axes_of(self.rows[x])}
        return len(owners) > 1 or any(n in self.firsts and n not in self.started for n in y.shape)

    def _axes_of(self, rows: Tensor) -> set[int]:
        """The lengths of the token axes that these rows belong to."""
        last = rows.max().item() if rows.numel() else -1
        return {n for n, first in self.firsts.items() if first <= last < first + n * self.batches[n]}

    def _pad(self, call: "_Call", rows: Tensor) -> Tensor:
        """Padding of the token dims belongs to no token; padding of other dims to the token beside it."""
        given = dict(zip(("input", "pad", "mode", "value"), call.args, strict=False)) | call.kwargs
        amounts, mode = list(given["pad"]), given.get("mode", "constant")
        if call.func is not torch.constant_pad_nd and mode != "constant":
            return _PAD(rows.double(), amounts, mode).long()
        for place in range(len(amounts) // 2):
            dim = rows.ndim - 1 - place
            if not _varies(rows, dim) and rows.shape[dim] > 1:
                size = rows.shape[dim] + sum(amounts[2 * place : 2 * place + 2])
                rows = rows.narrow(dim, 0, 1).expand(*rows.shape[:dim], size, *rows.shape[dim + 1 :])
                amounts[2 * place : 2 * place + 2] = [0, 0]
        return torch.constant_pad_nd(rows, amounts, -1)

    def _join(self, call: "_Call", sources: list[Tensor], y: Tensor) -> Tensor | None:
        """Joined rows; the entries of an operand without rows, or without gradient, belong to no token."""
        known = [x for x in sources if x in self.rows]
        live = [x for x in known if call.is_live(x) and x.numel()] or known
        parts = [self.rows[x] if _among(x, live) else torch.full(x.shape, -1, device=y.device) for x in sources]
        dim = call.argument(1, "dim", 0) % y.ndim
        stacked = call.func is torch.stack
        along_tokens = stacked or any(_varies(self.rows[x], dim) or x.shape[dim] == 1 for x in live)
        if along_tokens:
            self._check_joined(call, sources, live, y)
            return torch.stack(parts, dim) if stacked else torch.cat(parts, dim)
        found = [self.rows[x].narrow(dim, 0, 1).expand(y.shape) for x in live]
        same = all(torch.equal(rows, found[0]) for rows in found[1:])
        return found[0] if same else self._of_different_rows(y, found)

    def _written(self, call: "_Call") -> Tensor | None:
        """The rows after a write: those of a written value that has rows, else they stay; None if there are none.

        They also stay if the value's rows are those of another token axis.
        """
        target, value = call.args[0], call.args[2 if call.func is Tensor.__setitem__ else 1]
        known = isinstance(value, Tensor) and value in self.rows and call.is_live(value)
        live = call.is_live(target) and target in self.rows
        if not known or self._starts_axis([target, value] if live else [value], target):
            return self.rows.get(target)
        rows = self.rows[target].clone() if live else torch.full(target.shape, -1, device=target.device)
        if call.func is Tensor.__setitem__:
            rows[call.args[1]] = self.rows[value]
        else:
            rows = call.func(rows, self.rows[value], *call.args[2:], **call.kwargs)
        if target.shape[-1] in self.firsts:
            return rows
        beside = rows.amax(-1, keepdim=True)  # features that are not written belong to the token beside them
        return torch.where(rows < 0, beside, rows)

    # ---- other operations: rows of an operand, or of the tokens that stand there

    def _inherit(self, call: "_Call", number: int, y: Tensor) -> Tensor | None:
        """The rows of the operands with the leading dims of `y`, whose rows the operation keeps.

        Operands that require grad come first. None if the operation mixes tokens.
        """
        floats = [x for x in call.operands if _is_float(x) and x in self.rows]
        ranks = [[x for x in floats if call.is_live(x)], [x for x in floats if not call.is_live(x)]]
        ranks.append([x for x in call.operands if not _is_float(x) and x in self.rows])
        readings, mixed = self._by_size(y), []
        alike = _same_but_channels if call.func in _CONVOLUTIONS else _same_leading_dims
        for match, some in product((alike, _broadcast), ranks):
            if match is _broadcast and readings:
                continue
            matching = [(x, rows) for x in some if (rows := match(self.rows[x], y)) is not None]
            visible = all(any(torch.equal(rows, r) for r in readings) for _, rows in matching)
            found = [rows for x, rows in matching if visible or self._keeps_rows(call, number, y, x, rows)]
            mixed += [rows for _, rows in matching]
            if found:
                same = all(torch.equal(rows, found[0]) for rows in found[1:])
                return found[0] if same else self._of_different_rows(y, found)
        return None if readings or not y.requires_grad else self._in_order(mixed)

    def _keeps_rows(self, call: "_Call", number: int, y: Tensor, x: Tensor, rows: Tensor) -> bool:
        """True if every entry of a result depends, of the operand `x`, on the row of its own token alone.

        Rows are set to NaN, those with a given bit in their number and then all others, and `rows` tell which entries
        of the result may become NaN.
        """
        if _among(y, call.operands) or not (_is_float(x) and _is_float(y)):
            return True
        for bit, value in product(range(len(self.keep).bit_length()), (0, 1)):
            chosen = self.rows[x] >> bit & 1 == value
            probe = x.detach().masked_fill(chosen, torch.nan)
            result = call.with_operand(x, probe)[number]
            if (result.isnan() & ~y.isnan() & (rows >> bit & 1 != value)).any():
                return False
        return True

    def _of_different_rows(self, y: Tensor, found: list[Tensor]) -> Tensor | None:
        """The rows of a value that combines rows of different tokens: the tokens that stand there."""
        several = [rows for rows in found if len(rows.unique()) > self.batch]  # one row per sequence is broadcast
        if several and all(torch.equal(rows, several[0]) for rows in several[1:]):
            return several[0]
        rows = self._by_position(y)
        rows = self._in_order(found) if rows is None else rows
        if rows is None and y.requires_grad:
            raise ValueError(
                f"An operation combines rows of different tokens into a value of shape {list(y.shape)} without a dim "
                f"of {self.length} tokens, so its rows belong to no single token."
            )
        return rows

    def _in_order(self, found: list[Tensor]) -> Tensor | None:
        """Rows whose token axis can't be seen by size: those of an operand with all tokens in order.

        None if no operand has all tokens; ValueError if they are not in order.
        """
        complete = []
        for rows, (length, batch) in product(found, self.batches.items()):
            numbers = rows - self.firsts[length]
            for dim in range(rows.ndim):
                numbers = numbers.unique_consecutive(dim=dim)
            tokens, numbers = torch.arange(batch * length, device=rows.device), numbers.flatten()
            if torch.equal(numbers.sort().values, tokens):
                complete.append(rows)
                if torch.equal(numbers[(numbers // length).argsort(stable=True)], tokens):
                    return rows
        if complete:
            raise ValueError(
                f"An operation mixes tokens that are not in order, in a value of shape {list(complete[0].shape)} whose "
                "token axis can't be seen by size. The reference doesn't cover this."
            )
        return None

    # ---- ambiguous shapes are errors

    def _check_born(self, func: Function, sources: list[Tensor], results: list[Tensor]) -> None:
        """ValueError if a reshape of a value without token rows creates a dim of size T."""
        flat = [batch * length for length, batch in self.batches.items()]
        for y in results:
            source = sources[0]
            grown = self._tokens_in(y.shape) > self._tokens_in(source.shape)
            folded = source.shape[: 1 + (source.shape[:1].numel() not in flat)].numel()  # [B*T, ..] or [B*n, t, ..]
            unfolds = folded in flat and y.shape[:2].numel() == folded
            slices = func in _BROADCASTS | _JOINS | _PADS or func in (Tensor.__getitem__, torch.narrow, Tensor.narrow)
            if grown and y.requires_grad and not (unfolds or slices or y.ndim < source.ndim):
                raise ValueError(self._born(source, y))

    def _check_grown(self, func: Function, sources: list[Tensor], y: Tensor, descent: Tensor) -> None:
        """ValueError if a reshape or slice of token rows has a new dim of size T that isn't the token axis."""
        if func in _BROADCASTS | _JOINS | _PADS | {torch.gather, Tensor.gather} or not y.numel():
            return
        if y.ndim == 4 and y.shape[:-1] == sources[0].shape[:-1] and self._token_dims(descent):
            return  # scores without the columns of attention sinks: the rows are the queries
        grown = self._tokens_in(y.shape) - self._tokens_in(sources[0].shape)
        if grown > self._token_dims(descent) - self._token_dims(self.rows[sources[0]]):
            raise ValueError(self._born(sources[0], y))

    def _token_dims(self, rows: Tensor) -> int:
        return sum(size in self.firsts and _varies(rows, dim) for dim, size in enumerate(rows.shape))

    def _born(self, source: Tensor, y: Tensor) -> str:
        return (
            f"A view or slice of {list(source.shape)} has a new dim of size {self.length} in {list(y.shape)}, which is "
            f"also the number of tokens. {_REMEDY}."
        )

    def _check_joined(self, call: "_Call", sources: list[Tensor], live: list[Tensor], y: Tensor) -> None:
        """ValueError if tokens are joined with others before the length of the joined axis is known."""
        others = any(x.numel() and not _among(x, live) for x in sources)
        if others and y.requires_grad and self.given_length is None and not self._tokens_in(y.shape):
            raise ValueError(
                f"Token rows are joined with other rows into {list(y.shape)}. "
                "Pass the size of the joined axis, or of the tokens alone, as length=."
            )

    def _check_lost(self, call: "_Call", y: Tensor) -> None:
        """ValueError if a result without rows evidently still has tokens."""
        if not y.requires_grad or not any(x in self.rows and call.is_live(x) for x in call.operands):
            return
        folded = [size for size in y.shape[:2] if size not in self.firsts and size % self.batch == 0]
        one_query = y.shape[-2:-1] == (1,) and y.shape[-1] in self.firsts  # scores of a query that is no token
        if y.ndim > 2 and self._tokens_in(y.shape) and folded and not one_query and call.func not in _MOVES:
            raise ValueError(
                f"A value of shape {list(y.shape)} has {self.length} tokens but no batch dim. "
                "The reference doesn't cover this."
            )

    def _check_softmax(self, func: Function, args: tuple, kwargs: dict) -> None:
        """ValueError for scores [.., keys, queries], which would be cut by key instead of by query."""
        if func not in _SOFTMAX:
            return
        x = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        if not x.requires_grad or x not in self.rows or self._tokens_in(x.shape) < 2:
            return
        if _varies(self.rows[x], dim):
            raise ValueError(
                f"softmax goes over dim {dim} of scores {list(x.shape)}, whose first token dim is read as the "
                "queries. Write the scores as [.., queries, keys]."
            )

    # ---- losses: kept labelled tokens at the scale of all labelled tokens

    def _loss(self, func: Function, args: tuple, kwargs: dict) -> Tensor:
        """A torch loss; a loss over tokens becomes the loss of the kept labelled tokens."""
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given.get("size_average") is not None or given.get("reduce") is not None:
            given["reduction"] = legacy_get_string(given["size_average"], given["reduce"], emit_warning=False)
            given["size_average"] = given["reduce"] = None
        tensors = self._meet_all(given)
        if given.get("reduction", "mean") == "none":
            if self.weights is not None and any(x.requires_grad and x in self.rows for x in tensors):
                raise ValueError(f"{func.__name__} with reduction='none' can't apply weights. Use mean or sum.")
            return self._losses_of_tokens(func, given)
        if not any(x.requires_grad for x in tensors):
            return func(**given)
        if func in _UNDEFINED_LOSSES:
            return self._undefined_loss(func, given, tensors)
        return self._class_loss(func, given) if func in _CLASS_LOSSES else self._element_loss(func, given)

    def _losses_of_tokens(self, func: Function, given: dict) -> Tensor:
        """A loss with reduction="none". Its rows are those of the logits; the labels may be those of other tokens."""
        rows = self.rows.get(given["input"])
        if func not in _CLASS_LOSSES or rows is None:
            return self._see_inside(func, (), given)
        losses = func(**given)
        self._record(losses, self._without_classes(func, given["input"], rows))
        return losses

    def _undefined_loss(self, func: Function, given: dict, tensors: list[Tensor]) -> Tensor:
        if any(x in self.rows for x in tensors):
            raise ValueError(
                f"{func.__name__} over tokens is not defined here. Use reduction='none', and reduce the result."
            )
        return func(**given)

    def _linear_cross_entropy(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
    ) -> Tensor:
        options.pop("options", None)
        if options.get("ignore_index", -100) is None:
            del options["ignore_index"]
        with self:
            return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)

    def _class_loss(self, func: Function, given: dict) -> Tensor:
        """cross_entropy and nll_loss: input [N, C] or [B, C, ..], target class indices or (soft) probabilities."""
        logits, target = given["input"], given["target"]
        rows = self.rows.get(logits)
        if self._is_per_instance(rows):
            return func(**given)
        rows = self._without_classes(func, logits, rows)
        kept, factors = self._kept(rows), self._factors(rows)
        if target.is_floating_point():
            return _scaled(func(**{**given, "reduction": "none"}), kept, given["reduction"], factors=factors)
        labelled = target != given["ignore_index"]
        live = labelled & kept
        class_weights = labelled if given["weight"] is None else given["weight"][target.clamp(min=0)] * labelled
        given = {**given, "target": torch.where(live, target, given["ignore_index"])}
        if factors is not None:
            return _estimated(func(**{**given, "reduction": "none"}), live, factors, given["reduction"], class_weights)
        total = func(**{**given, "reduction": "sum"})
        if given["reduction"] == "sum":
            return total * labelled.sum() / live.sum().clamp(min=1)
        return func(**given) if (class_weights * live).sum() != 0 else total * 0

    def _without_classes(self, func: Function, logits: Tensor, rows: Tensor) -> Tensor:
        """The rows of the losses, given those of the logits."""
        class_dim = min(1, logits.ndim - 1)
        if _varies(rows, class_dim):
            raise ValueError(
                f"The class dim of {func.__name__}'s input {list(logits.shape)} holds tokens. Move classes to dim 1."
            )
        return rows.select(class_dim, 0)

    def _element_loss(self, func: Function, given: dict) -> Tensor:
        """Regression and binary losses: one term per entry of the (broadcast) operands."""
        terms = func(**{**given, "reduction": "none"})
        rows = self._rows_of_terms(func, given, terms)
        if self._is_per_instance(rows):
            return func(**given)
        weight = given.get("weight") if func in _MEAN_DIVIDES_BY_WEIGHT else None
        return _scaled(terms, self._kept(rows), given["reduction"], weight, self._factors(rows))

    def _rows_of_terms(self, func: Function, given: dict, terms: Tensor) -> Tensor | None:
        operands = [given["input"], given["target"]]
        live = frozenset(id(x) for x in operands if x.requires_grad)
        call = _Call(func, (), {**given, "reduction": "none"}, operands, live)
        rows = self._inherit(call, 0, terms)
        return self._by_position(terms) if rows is None else rows

    def _is_per_instance(self, rows: Tensor | None) -> bool:
        """True for a loss of at most one token per instance, or of a value without tokens: it is left unchanged."""
        if rows is None:
            return True
        owners = torch.cat(
            [self.firsts[n] + torch.arange(batch).repeat_interleave(n) for n, batch in self.batches.items()]
        )
        owners = owners[rows[rows >= 0].unique().cpu()]
        return len(owners) == len(owners.unique())


@dataclass(frozen=True)
class _Call:
    """One call of a torch function; `live`: the ids of the operands that required grad before it."""

    func: Function
    args: tuple
    kwargs: dict
    operands: list[Tensor]
    live: frozenset[int]

    @property
    def sources(self) -> list[Tensor]:
        """The first argument, which is one tensor or several."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return [first] if isinstance(first, Tensor) else list(first)

    def is_live(self, x: Tensor) -> bool:
        return id(x) in self.live

    def argument(self, place: int, name: str, default: Any) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def on(self, source: Any) -> Any:
        """The result for another first argument."""
        if self.args:
            return self.func(source, *self.args[1:], **self.kwargs)
        return self.func(**{**self.kwargs, next(iter(self.kwargs)): source})

    def with_operand(self, x: Tensor, value: Tensor) -> list[Tensor]:
        """The results if the operand `x` had another value; draws no random numbers from the global generator."""
        args, kwargs = tree_map(lambda a: value if a is x else a, (self.args, self.kwargs))
        with torch.no_grad(), torch.random.fork_rng([]):
            return [y for y in tree_leaves(self.func(*args, **kwargs)) if isinstance(y, Tensor)]


_REMEDY = "Use another length for the check"
_DISPATCH_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _checked(indices: Tensor) -> Tensor:
    """`indices` if it is int64 [B, k] with strictly increasing, non-negative rows; else ValueError."""
    if indices.dtype != torch.int64 or indices.ndim != 2:
        raise ValueError(f"Expected indices int64 [B, k], got {indices.dtype} {list(indices.shape)}.")
    if (indices < 0).any() or (indices.diff(dim=1) <= 0).any():
        raise ValueError("Expected indices that are non-negative and strictly increasing in each row. Sort them.")
    return indices


def _checked_weights(weights: Tensor | None, indices: Tensor) -> Tensor | None:
    """`weights` if it is None or float, one for every kept token; else ValueError."""
    if weights is not None and not (weights.is_floating_point() and weights.shape == indices.shape):
        raise ValueError(f"Expected weights float {list(indices.shape)}, got {weights.dtype} {list(weights.shape)}.")
    return None if weights is None else weights.detach()


def _length_of(inputs: list[Any], batch: int) -> int:
    """T of the first input [B, T], [B, T, D] or [T, B, D]; ValueError if there is none."""
    for x in inputs:
        if isinstance(x, Tensor) and x.ndim in (2, 3) and batch in x.shape[:2]:
            return x.shape[1] if x.shape[0] == batch else x.shape[0]
    raise ValueError(f"No input has the shape [B, T] or [B, T, D] with B = {batch}. Pass length=T.")


def _view_of_leaf(x: Any) -> Any:
    is_leaf_input = isinstance(x, Tensor) and x.requires_grad and x.is_leaf and not isinstance(x, nn.Parameter)
    return x.view_as(x) if is_leaf_input else x


def _is_opaque(func: Function) -> bool:
    """True for attribute access, autograd's own calls, and all calls under torch.func's transforms."""
    attribute = getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__") and func not in _MOVES
    return attribute or func in _OPAQUE or torch._C._functorch.peek_interpreter_stack() is not None


def _is_composite(func: Function) -> bool:
    return isinstance(func, types.FunctionType) and func.__globals__ is vars(F) and func.__closure__ is None


def _among(x: Tensor, others: Iterable[Tensor]) -> bool:
    return any(x is other for other in others)


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _along(numbers: Tensor, dim: int, ndim: int) -> Tensor:
    return numbers.view([-1 if d == dim else 1 for d in range(ndim)])


def _varies(rows: Tensor, dim: int) -> bool:
    return bool(rows.numel() and (rows != rows.narrow(dim, 0, 1)).any())


def _same_leading_dims(rows: Tensor, y: Tensor) -> Tensor | None:
    """Rows of an operand for a result of the same shape, or of one that differs only in a last dim of features."""
    if rows.shape == y.shape:
        return rows
    if rows.shape == y.shape[:-1]:
        return rows.unsqueeze(-1).expand(y.shape)
    if rows.ndim < 2 or _varies(rows, -1):
        return None
    if rows.shape[:-1] == y.shape[:-1]:
        return rows[..., :1].expand(y.shape)
    return rows[..., 0] if rows.shape[:-1] == y.shape else None


def _same_but_channels(rows: Tensor, y: Tensor) -> Tensor | None:
    """Rows of the operand of a convolution for a result of the same positions."""
    fits = rows.ndim == y.ndim and rows.shape[2:] == y.shape[2:] and not _varies(rows, 1)
    return rows[:, :1].expand(y.shape) if fits else None


def _broadcast(rows: Tensor, y: Tensor) -> Tensor | None:
    fits = rows.ndim == y.ndim and all(r in (1, s) for r, s in zip(rows.shape, y.shape, strict=True))
    return rows.expand(y.shape) if fits else None


def _scaled(
    terms: Tensor, kept: Tensor, reduction: str, weight: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:
    """Mean over the kept terms, or their sum times (all terms / kept terms); 0 if none is kept.

    `weight`: the factors that the loss multiplied terms by, if its mean divides by their sum. `factors`: as in
    `_estimated`.
    """
    if factors is not None:
        return _estimated(terms, kept, factors, reduction, torch.ones_like(terms) if weight is None else weight)
    total = torch.where(kept, terms, torch.zeros_like(terms)).sum()
    if reduction == "sum":
        return total * terms.numel() / kept.sum().clamp(min=1)
    divisor = kept.sum() if weight is None else torch.where(kept, weight, torch.zeros_like(weight)).sum()
    return total / divisor if divisor != 0 else total * 0


def _estimated(terms: Tensor, live: Tensor, factors: Tensor, reduction: str, weight: Tensor) -> Tensor:
    """The sum of factor * term over the live terms; a mean divides it by the weight of all terms, live or not."""
    total = torch.where(live, factors.to(terms.dtype) * terms, torch.zeros_like(terms)).sum()
    if reduction == "sum":
        return total
    return total / weight.sum() if weight.sum() != 0 else total * 0
