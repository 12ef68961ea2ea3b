"""The eager definition of token ditching: slow, simple, and independent of all graph passes.

    with reference.ditching(model, indices):
        loss = model(**batch).loss
        loss.backward()

``indices[b]`` lists the kept tokens of instance b. The forward is unchanged. The gradient of every activation row
outside the selection is zero, as if ``torch.where(selected, x, x.detach())`` followed every operation; here gradient
hooks do this, so that views and in-place writes keep their meaning. A torch loss over tokens becomes the loss of the
kept labelled tokens at the scale of the full loss or, with ``weights``, an estimate of the full loss. Blocks in
``open_blocks`` keep the keys and values of all tokens live.

The token of each entry of a value is determined in two ways. If they disagree, it is an error:

- by size: the dim of size T is the token axis, the dim of size B the batch (so T and B must be distinctive numbers);
- by descent, if sizes don't show it (a slice, ``[B*T, D]``, ``[B*H, T, d]``): views and copies are replayed on the row
  numbers of their source, and other operations keep the rows of the operand with the same leading dims.

Not covered: reentrant gradient checkpointing, token mixing inside a custom ``autograd.Function`` (its inputs and
outputs are covered), multi-layer ``nn.LSTM``/``nn.GRU`` (one call is one operation), and attention scores whose keys
come before their queries: a softmax over these is an error, other scores must be written as [.., queries, keys]. A
token axis without a selection is left unchanged.
"""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
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
    "index_select", "take_along_dim", "masked_select", "diagonal", "unfold", "contiguous", "clone", "__getitem__",
)
_UNDEFINED_LOSS_NAMES = (
    "kl_div", "ctc_loss", "gaussian_nll_loss", "hinge_embedding_loss", "cosine_embedding_loss", "margin_ranking_loss",
    "multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss", "poisson_nll_loss",
    "soft_margin_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss",
)
# fmt: on
_MOVES = {getattr(owner, name) for owner in (torch, Tensor) for name in _MOVE_NAMES if hasattr(owner, name)}
_MOVES |= {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__} | _JOINS
_RESHAPES_IN_PLACE = {
    getattr(Tensor, f"{name}_") for name in ("transpose", "t", "squeeze", "unsqueeze", "swapaxes", "swapdims", "resize")
}
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
            encoder-decoder).

    Raises:
        ValueError: `indices` or `weights` is malformed; another dim has size T or B; a value mixes tokens so that its
            rows belong to no single token; gradient checkpointing is on; `weights` are given and a loss has
            reduction="none", which can't apply them.

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
        self.others: dict[int, Tensor] = {}
        self.firsts: dict[int, int] = {}
        self.keep = torch.empty(0, dtype=torch.bool)
        self.factors: Tensor | None = None
        self.rows = WeakTensorKeyDictionary()
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
        self.length, self.rows, self.inside = length, WeakTensorKeyDictionary(), 0
        kept = []
        for size, indices in {length: self.indices, **self.others}.items():
            self._check_axis(size, indices, shapes)
            self.firsts[size] = sum(map(torch.numel, kept))
            none = torch.zeros(self.batch, size, dtype=torch.bool, device=indices.device)
            kept.append(none.scatter_(1, indices, True).flatten())
        self.keep = torch.cat(kept)
        if self.weights is not None:
            self.factors = self.weights.new_zeros(self.batch, length).scatter(1, self.indices, self.weights).flatten()

    def _check_axis(self, length: int, indices: Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        if indices.numel() and int(indices.max()) >= length:
            raise ValueError(
                f"indices select position {int(indices.max())}, but a sequence has {length} tokens. "
                "Positions count from 0."
            )
        if length == self.batch or length == 1:
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
        self._check_softmax(func, args, kwargs)
        if func in _RESHAPES_IN_PLACE:
            self.rows.pop(args[0], None)
        out = func(*args, **kwargs)
        self._place(func, args, kwargs, operands, out)
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
            self._record(x, self._agree(x, None))
        else:
            self._hook(x)

    def _place(self, func: Function, args: tuple, kwargs: dict, operands: list[Tensor], out: Any) -> None:
        """Determine the rows of every tensor in `out`, and hook it."""
        results = [y for y in tree_leaves(out) if isinstance(y, Tensor)]
        moved = self._move(func, args, kwargs, results) if func in _MOVES else None
        for y, descent in zip(results, moved or [None] * len(results), strict=True):
            if y in self.rows and self.rows[y].shape == y.shape:  # modified in place, or returned unchanged
                self._hook(y)
                continue
            if descent is None and (func not in _MOVES or func in _JOINS):
                descent = self._inherit(y, operands)
            rows = self._agree(y, descent)
            if rows is None:
                self._check_lost(func, y, operands)
            self._record(y, rows)

    def _record(self, y: Tensor, rows: Tensor | None) -> None:
        if rows is not None:
            self.rows[y] = rows
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
        return None if self.factors is None else self.factors.to(rows.device)[rows]

    # ---- the token of a row: row number b * T + t for every entry of a value, continued over the token axes

    def _by_size(self, y: Tensor) -> list[Tensor]:
        """The rows of `y` for each reading of its shape as one batch dim and one token dim, earlier dims first."""
        tokens = [dim for dim, size in enumerate(y.shape) if size in self.firsts]
        batches = [None] if self.batch == 1 else [dim for dim, size in enumerate(y.shape) if size == self.batch]
        return [self._numbered(y, b, t) for b, t in product(batches, tokens)]

    def _numbered(self, y: Tensor, batch_dim: int | None, token_dim: int) -> Tensor:
        length = y.shape[token_dim]
        rows = self.firsts[length] + _along(torch.arange(length, device=y.device), token_dim, y.ndim)
        if batch_dim is not None:
            rows = rows + length * _along(torch.arange(self.batch, device=y.device), batch_dim, y.ndim)
        return rows.expand(y.shape)

    def _tokens_in(self, shape: Iterable[int]) -> int:
        """The number of dims with the size of a token axis."""
        return sum(size in self.firsts for size in shape)

    def _agree(self, y: Tensor, descent: Tensor | None) -> Tensor | None:
        """The rows of `y` by size and descent; None if it has no token axis; ValueError if the two disagree."""
        readings = self._by_size(y)
        if descent is None and len(readings) > 1:
            score_matrix = self._tokens_in(y.shape) == len(readings) == 2  # [.., T, T]: rows are queries
            if not score_matrix and y.requires_grad:
                raise ValueError(
                    f"A value of shape {list(y.shape)} has several dims of the batch size {self.batch} or of "
                    f"{self.length} tokens. {_REMEDY}, or another batch size."
                )
            return readings[0] if score_matrix else None
        if descent is None or len(readings) != 1 or torch.equal(descent, readings[0]):
            return descent if descent is not None else next(iter(readings), None)
        token_dim = next(dim for dim, size in enumerate(y.shape) if size in self.firsts)
        if y.requires_grad and _varies(descent, token_dim):
            raise ValueError(
                f"The {y.shape[token_dim]} entries along dim {token_dim} of a value of shape {list(y.shape)} are not "
                f"the tokens in order (tokens reordered, or another dim of that size). {_REMEDY}."
            )
        return descent  # the dim of size T holds the keys of a slice of queries

    def _move(self, func: Function, args: tuple, kwargs: dict, results: list[Tensor]) -> list[Tensor | None] | None:
        """Replay a view or copy on the row numbers of its source; None if these are unknown."""
        if any(isinstance(a, torch.dtype) for a in tree_leaves((args, kwargs))):
            return None
        name, source = (0, args[0]) if args else next(iter(kwargs.items()))
        sources = [source] if isinstance(source, Tensor) else list(source)
        known = [self.rows.get(x) for x in sources]
        if any(rows is None for rows in known):
            self._check_born(func, sources, results)
            return None
        numbers = [rows.contiguous() for rows in known]
        moved = numbers[0] if isinstance(source, Tensor) else numbers
        moved = func(moved, *args[1:], **kwargs) if name == 0 else func(**{**kwargs, name: moved})
        rows = [r for r in tree_leaves(moved) if isinstance(r, Tensor)]
        for y, descent in zip(results, rows, strict=True):
            self._check_grown(func, sources, y, descent)
        return rows  # type: ignore[return-value]

    def _inherit(self, y: Tensor, operands: list[Tensor]) -> Tensor | None:
        """The rows of the operands with the leading dims of `y`; operands that require grad come first."""
        floats = [x for x in operands if _is_float(x) and x in self.rows]
        ranks = [[x for x in floats if x.requires_grad], [x for x in floats if not x.requires_grad]]
        ranks.append([x for x in operands if not _is_float(x) and x in self.rows])
        visible = bool(self._by_size(y))
        for match, some in product((_same_leading_dims, _broadcast), ranks):
            if match is _broadcast and visible:
                continue
            found = [rows for x in some if (rows := match(self.rows[x], y)) is not None]
            if found and all(torch.equal(rows, found[0]) for rows in found[1:]):
                return found[0]
            if found and not visible and y.requires_grad:
                raise ValueError(
                    f"An operation combines rows of different tokens into a value of shape {list(y.shape)} without a "
                    f"dim of {self.length} tokens. The reference doesn't cover this."
                )
            if found:
                return None
        return None

    # ---- ambiguous shapes are errors

    def _check_born(self, func: Function, sources: list[Tensor], results: list[Tensor]) -> None:
        """ValueError if a reshape of a value without token rows creates a dim of size T."""
        flat = [self.batch * length for length in self.firsts]
        for y in results:
            source = sources[0]
            grown = self._tokens_in(y.shape) > self._tokens_in(source.shape)
            unfolds = (
                source.shape[:1].numel() in flat
                and y.shape[:2].numel() == source.shape[0]
                and self.batch in y.shape[:2]
            )
            slices = func in _BROADCASTS or func in _JOINS or func in (Tensor.__getitem__, torch.narrow, Tensor.narrow)
            if grown and y.requires_grad and not (unfolds or slices or y.ndim < source.ndim):
                raise ValueError(self._born(source, y))

    def _check_grown(self, func: Function, sources: list[Tensor], y: Tensor, descent: Tensor) -> None:
        """ValueError if a reshape or slice of token rows has a new dim of size T that isn't the token axis."""
        if func in _BROADCASTS or func in _JOINS or not y.numel():
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

    def _check_lost(self, func: Function, y: Tensor, operands: list[Tensor]) -> None:
        """ValueError if a result without rows evidently still has tokens."""
        if not y.requires_grad or not any(x in self.rows and x.requires_grad for x in operands):
            return
        if func in _JOINS and self.given_length is None:
            raise ValueError(
                f"Token rows are joined with other rows into {list(y.shape)}. "
                "Pass the size of the joined axis as length=."
            )
        folded = [size for size in y.shape[:2] if size not in self.firsts and size % self.batch == 0]
        one_query = y.shape[-2:-1] == (1,) and y.shape[-1] in self.firsts  # scores of a query that is no token
        if y.ndim > 2 and self._tokens_in(y.shape) and folded and not one_query and func not in _MOVES:
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
        self._record(losses, self._agree(losses, self._without_classes(func, given["input"], rows)))
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
        if self._is_per_instance(func, logits, rows):
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
            return total * (labelled.sum() / live.sum().clamp(min=1)).to(total.dtype)
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
        rows = self._agree(terms, self._inherit(terms, [given["input"], given["target"]]))
        if self._is_per_instance(func, terms, rows):
            return func(**given)
        weight = given.get("weight") if func in _MEAN_DIVIDES_BY_WEIGHT else None
        return _scaled(terms, self._kept(rows), given["reduction"], weight, self._factors(rows))

    def _is_per_instance(self, func: Function, value: Tensor, rows: Tensor | None) -> bool:
        """True for a loss of one row per instance (pooled, or one token) or of another output per instance (an image).

        Such a loss is left unchanged. ValueError if the rows are unknown.
        """
        if rows is not None:
            owners = torch.cat([torch.arange(self.batch).repeat_interleave(size) for size in self.firsts])
            return sorted(owners[rows.unique().cpu()].tolist()) == [*range(self.batch)]
        if value.ndim == 0 or value.shape[0] == self.batch:
            return True
        raise ValueError(
            f"{func.__name__} takes a value of shape {list(value.shape)}, whose tokens are unknown. "
            "The reference doesn't cover this."
        )


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


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _along(numbers: Tensor, dim: int, ndim: int) -> Tensor:
    return numbers.view([-1 if d == dim else 1 for d in range(ndim)])


def _varies(rows: Tensor, dim: int) -> bool:
    return bool((rows != rows.narrow(dim, 0, 1)).any())


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
        return total * (terms.numel() / max(1, int(kept.sum())))
    divisor = kept.sum() if weight is None else torch.where(kept, weight, torch.zeros_like(weight)).sum()
    return total / divisor if divisor != 0 else total * 0


def _estimated(terms: Tensor, live: Tensor, factors: Tensor, reduction: str, weight: Tensor) -> Tensor:
    """The sum of factor * term over the live terms; a mean divides it by the weight of all terms, live or not."""
    total = torch.where(live, factors.to(terms.dtype) * terms, torch.zeros_like(terms)).sum()
    if reduction == "sum":
        return total
    return total / weight.sum() if weight.sum() != 0 else total * 0
