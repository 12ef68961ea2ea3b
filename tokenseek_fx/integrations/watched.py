"""The backend with an account of its forwards: the figures that callbacks log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..compilation import Trained, compile_graph
from ..compiled import Rewritten
from ..config import Config
from ..explanation import flops_of_step
from ..passes.memory.recompute import RecomputePlan
from ..passes.streams.trace import Rewrite
from ..peak import forget_peak, peak_bytes
from ..recording import Recording, Selection, record
from ..variants import Variants

MIB = 2**20
#: The work of a step that chooses tokens, beside the forward over all tokens.
_CHOOSING = ("scoring", "select")


class Watched:
    """The backend for ``torch.compile(backend=...)``, with a config, that keeps an account of its training forwards.

    ``selection``: that of the last training forward. None: it kept all tokens.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.graphs = config, 0
        self.selection: Selection | None = None
        self.counts = _Counts()
        self.saved: int | None = None
        self.share: float | None = None
        self.shares: dict[Trained, float | None] = {}

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_graph(gm, inputs, self.config)
        if not isinstance(compiled, Trained):
            return compiled
        self.graphs += 1
        return partial(self._run, compiled)

    def _run(self, compiled: Trained, *args: Any) -> Any:
        with record() as rec:
            outputs = compiled(*args)
        self.selection = rec[-1] if rec else None
        self.counts.add(rec)
        if self.saved is None:
            self.saved = saved_bytes(outputs, args)
        if compiled not in self.shares:
            self.shares[compiled] = scoring_share(compiled, args)
        self.share = self.shares[compiled]
        return outputs

    def figures(self, device: torch.device) -> dict[str, float]:
        """The figures to log of the forwards since the last call; an unknown figure is omitted.

        ``kept``: the kept fraction of the tokens; ``kept_labelled``: that of the labelled tokens. ``scoring_share``:
        the fraction of a step's matrix-product FLOPs that chooses tokens. ``recompiles``: training graphs after the
        first. ``activations_mib``: MiB that one forward saved for backward. ``peak_mib``: peak MiB allocated on the
        device since the last call, by any code; on the CPU, peak resident memory.
        """
        peak = peak_bytes(device)
        known = {
            **self.counts.shares(),
            "scoring_share": self.share,
            "recompiles": max(0, self.graphs - 1),
            "activations_mib": None if self.saved is None else self.saved / MIB,
            "peak_mib": None if peak is None else peak / MIB,
        }
        self.counts, self.saved = _Counts(), None
        forget_peak(device)
        return {name: value for name, value in known.items() if value is not None}


class _Counts:
    """Counts of tokens and labelled tokens, all and kept. Labelled counts stay on the device until they are read."""

    def __init__(self) -> None:
        self.tokens = self.kept = 0
        self.labelled: Tensor | int = 0
        self.labelled_kept: Tensor | int = 0

    def add(self, rec: Recording) -> None:
        for step in rec:
            self.tokens += step.scores.numel()
            self.kept += step.indices.numel()
            if step.labelled is not None:
                self.labelled = self.labelled + step.labelled.sum()
                self.labelled_kept = self.labelled_kept + step.labelled.gather(1, step.indices).sum()

    def shares(self) -> dict[str, float]:
        """The kept fractions. Without a recording the forwards kept all tokens."""
        shares = {"kept": self.kept / self.tokens if self.tokens else 1.0}
        if labelled := int(self.labelled):
            shares["kept_labelled"] = int(self.labelled_kept) / labelled
        return shares


def scoring_share(trained: Trained, args: Sequence[Any]) -> float | None:
    """The fraction of a step's matrix-product FLOPs that chooses tokens, 0 to 1, counted on fake tensors.

    None: no tokens were chosen.
    """
    own = trained.own
    chosen = [compiled for _, compiled in own.known] if isinstance(own, Variants) else [own]
    rewritten = next((compiled for compiled in reversed(chosen) if isinstance(compiled, Rewritten)), None)
    if rewritten is None or rewritten.program[Rewrite] is None:
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in args]
    with mode:  # fake noise leaves the state of the generator unchanged
        fakes += rewritten.noise(fakes)
    flops = flops_of_step(rewritten.program[Rewrite].module, fakes, rewritten.program[RecomputePlan].share)
    return sum(flops[kind] for kind in _CHOOSING) / (flops.total() or 1)


def saved_bytes(outputs: Iterable[Any], inputs: Iterable[Any]) -> int | None:
    """Bytes on the device that a compiled forward saved for backward: each storage once, without the forward's inputs.

    None if autograd has no compiled function (``inner="eager"``).
    """
    live = [x for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None]
    saved = [x for node in _nodes(x.grad_fn for x in live) if hasattr(node, "saved_tensors") for x in _saved(node)]
    if not saved:
        return None
    known = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
    here = [x.untyped_storage() for x in saved if x.device == live[0].device]
    return sum({s.data_ptr(): s.nbytes() for s in here if s.data_ptr() not in known}.values())


def _nodes(last: Iterable[Any]) -> Iterator[Any]:
    """All nodes of autograd's graph behind ``last``."""
    ahead, seen = list(last), set()
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions if before is not None]
            yield node


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors that an autograd node saves, including those that AOTAutograd keeps outside ``saved_tensors``."""
    yield from (x for x in (*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ())) if x is not None)
