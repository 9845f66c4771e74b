"""How long the parts of a job take on this machine, by running each of them for a moment.

The passes are those of the job: its own sweep, its own head and least squares, on a model of its shape with random
weights and a few of its layers, sequences of its own length. Where a pass at full length takes too long, a shorter one
is run, and its time counted by the token. Nothing is read, and nothing written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import Batch, calibration_from_tokens
from prunus.calibration.decoding_attention import decoding_attention
from prunus.calibration.sampled import cache_argument, draw_tokens, token_cache
from prunus.checkpoint import empty_model, pruned_config
from prunus.checkpoint.random_weights import random_weights
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.families import family_of
from prunus.model.geometry import Geometry
from prunus.model.loss import chunked_cross_entropy, head_function
from prunus.model.modules import submodule
from prunus.model.widths import LayerWidths
from prunus.repair.least_squares import TokenSums, solve_ridge_
from prunus.scoring.score import ScoringOptions, take_statistics
from prunus.selection.select import select
from prunus.selection.table import build_table
from prunus.sweep import Engine
from prunus.sweep.blocks import last_hidden_states
from prunus.sweep.objective import losses_and_gradient

__all__ = ["Probe"]

#: layers that a sample has, at least this many bytes of them where the model is so large: weights come out of memory in
#: a job, not out of a cache
LAYER_BYTES = 48 * 2**20
#: seconds for one measurement, and how often it is repeated at most
ALLOWANCE, REPEATS = 0.5, 2
#: seconds for all measurements together; those that come later are as short as can be
ALTOGETHER = 4.0
#: units of the first, shortest run
FIRST = 16
#: tokens of which the head makes logits at a time, and the fewest of which a token takes about as long as of so many:
#: its matrix is brought into another order once for all of them
AT_ONCE, FEWEST = 512, 64
#: tokens that a text is continued by, in all runs of that measurement together, at most
STEPS = 16
#: columns and rows of the matrix that is solved, at most
SOLVED = 512
#: channels of a layer that groups are selected from
SELECTED = 2048


class Probe:
    """Seconds of parts of a job on a model of a certain shape.

    Args:
        empty: the model without weights, in the dtype that it will be held in.
        device: where it will run.
        batch_size: sequences per pass.
        engine: which one the model will be held for; streamed has little memory, and a sample of one layer.

    Attributes:
        scale: layers of the model, by their parameters, for each layer of the sample.
    """

    def __init__(self, empty: Any, device: torch.device, batch_size: int, engine: Engine = "resident"):
        self._begun = time.perf_counter()
        self._device, self._batch_size = device, batch_size
        layers = submodule(empty, family_of(empty.config).layers)
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        mean = sum(sizes) / len(sizes)
        many = round(LAYER_BYTES / (mean * empty.dtype.itemsize)) if engine == "resident" else 1
        count = min(len(sizes), max(1, many))
        chosen = [number * len(sizes) // count for number in range(count)]
        geometry = Geometry.of(empty)
        sparse = [number for number, widths in enumerate(geometry.widths) if widths.num_experts]
        if sparse and not set(sparse) & set(chosen):
            chosen[-1] = max(sparse[0], chosen[-1])  # of a mixture, nearly all of whose weights are there
        config = pruned_config(empty.config, [geometry.widths[number] for number in chosen], chosen)
        self._model = random_weights(empty_model(config, empty.dtype), device).requires_grad_(False)
        self._geometry = Geometry.of(self._model)
        steps = [block for block in self._geometry.blocks(0) if not block.experts]
        self._widest = max(self._geometry.size(0, block.output.inputs) for block in steps)
        self._measured: dict[object, float] = {}
        self._vocabulary = int(config.get_text_config().vocab_size)
        self._decoder = submodule(self._model, geometry.family.layers.rpartition(".")[0])
        self.scale = sum(sizes) / sum(sizes[number] for number in chosen)

    def scoring(self, options: ScoringOptions, seq_len: int) -> float:
        """Seconds per token of a scoring pass through all layers, without the head."""
        if not options.needs:
            return 0.0
        head = self.head_backward if options.takes_gradients else 0.0
        # A backward pass takes about twice as long as a forward pass.
        affordable = int(ALLOWANCE / (3 * self.forward(seq_len) / self.scale + head))
        length = min(seq_len, max(FIRST, affordable // self._batch_size))

        def run(passes: int) -> None:
            sequences = calibration_from_tokens(self._ids(passes * self._batch_size, length))
            take_statistics(self._model, sequences, options.parts, options, batch_size=self._batch_size, progress=False)

        each = self._known((options, seq_len), lambda: self._one_more(run)) / (self._batch_size * length)
        return max(each - head, 0.0) * self.scale

    def forward(self, seq_len: int) -> float:
        """Seconds per token of a forward pass through all layers, without the head."""

        def run(tokens: int) -> None:
            with evaluation_mode(self._model), torch.no_grad():
                list(last_hidden_states(self._model, [Batch(self._ids(1, tokens), None)]))

        return self._seconds(("forward", seq_len), run, seq_len) * self.scale

    @property
    def head_forward(self) -> float:
        """Seconds per token of the head and its loss."""
        head = head_function(self._model)

        def run(tokens: int) -> None:
            chunked_cross_entropy(self._hidden(1, tokens), head, self._ids(1, tokens))

        return self._seconds("head forward", run, first=FEWEST)

    @property
    def head_backward(self) -> float:
        """Seconds per token of the head, its loss and the gradient."""
        head = head_function(self._model)

        def run(tokens: int) -> None:
            losses_and_gradient(self._hidden(1, tokens), head, self._ids(1, tokens))

        return self._seconds("head backward", run, first=FEWEST)

    def writing(self, rows: int, context: int, draws: bool) -> float:
        """Seconds of one token more for some texts side by side, behind so many others.

        Args:
            rows: texts.
            context: tokens before the new one.
            draws: whether it is drawn at random, as text for calibration is; else it is the most likely one.
        """
        head, shape = head_function(self._model), self._geometry
        cache = token_cache(self._model.config, context + STEPS)
        for layer_idx, widths in enumerate(shape.widths):
            if widths["attention"]:
                states = torch.zeros(
                    rows, widths["attention"], context, shape.head_dim, dtype=self._model.dtype, device=self._device
                )
                cache.update(states, states.clone(), layer_idx)
        name = cache_argument(self._decoder)
        read = self._ids(rows, 1).to(self._device)

        @torch.no_grad()
        def layers(steps: int) -> None:
            for _ in range(steps):
                self._decoder(input_ids=read, **{name: cache}, use_cache=True)

        @torch.no_grad()
        def choose(steps: int) -> None:
            for _ in range(steps):
                logits = head(self._hidden(rows, 1))[:, -1].cpu()
                if draws:
                    draw_tokens(logits, torch.Generator().manual_seed(0))

        with evaluation_mode(self._model), decoding_attention(self._model) if draws else nullcontext():
            below = self._seconds(("layers", rows, context, draws), layers, 2, first=1) * self.scale
            return below + self._seconds(("choose", rows, draws), choose, 2, first=1)

    def sums(self, inputs: int, outputs: int, seq_len: int) -> float:
        """Seconds per token of what a projection is solved from: measured on the widest, for others by operations."""
        widest = self._widest
        sums = TokenSums(widest, outputs, self._device)

        def run(tokens: int) -> None:
            sums.add(self._floats(tokens, widest), self._floats(tokens, outputs))

        def operations(width: int) -> int:
            return width * (width + 2 * outputs)

        return self._seconds("sums", run, seq_len) * operations(inputs) / operations(widest)

    def solution(self, inputs: int, outputs: int) -> float:
        """Seconds to solve a projection in float64: measured on a square one, for others by operations."""
        size = min(SOLVED, self._widest)
        sums = TokenSums(size, size, self._device)
        sums.add(self._floats(2 * size, size), self._floats(2 * size, size))
        equations, weight = sums.equations(), self._floats(size, size).double()

        def run(times: int) -> None:
            for _ in range(times):
                equations.error(weight)
                solve_ridge_(replace(equations), weight, 0.1)

        def operations(width: int, rows: int) -> float:
            return width**3 / 3 + 3 * width**2 * rows

        return self._seconds("solution", run, 1, first=1) * operations(inputs, outputs) / operations(size, size)

    @cached_property
    def selection(self) -> float:
        """Seconds per group to rank it, and to decide whether it goes."""
        widths = self._geometry.widths
        # Of a mixture a layer with experts, as it is.
        number = next((number for number, layer in enumerate(widths) if layer.num_experts), 0)
        first = narrow = widths[number]
        if not first.num_experts:
            narrow = LayerWidths(first.num_key_value_heads, min(first.intermediate_size, SELECTED))
        config = pruned_config(self._model.config, [narrow], [number])
        geometry = Geometry.of(empty_model(config, self._model.dtype))
        importance = [{axis: torch.arange(narrow[axis], dtype=torch.float64) for axis in geometry.axes}]

        def run(times: int) -> None:
            select(build_table(geometry, importance), geometry, 0.01, last=False)

        return self._seconds("selection", run, 1, first=1) / max(1, sum(narrow[axis] for axis in geometry.axes))

    def _seconds(self, what: object, run: Callable[[int], object], units: int = AT_ONCE, first: int = FIRST) -> float:
        """Seconds per unit of something, run for as many units as a job does, or as many as there is time for."""
        return self._known(what, lambda: self._measure(run, units, first))

    def _known(self, what: object, measure: Callable[[], float]) -> float:
        """A measurement that is made once."""
        if what not in self._measured:
            self._measured[what] = measure()
        return self._measured[what]

    def _one_more(self, run: Callable[[int], object]) -> float:
        """Seconds that a pass more takes: what is done once for all passes counts in neither."""
        self._timed(run, 1)  # also sets up what a first run sets up
        one, three = self._timed(run, 1), self._timed(run, 3)
        return (three - one) / 2 if three > one else three / 3

    def _measure(self, run: Callable[[int], object], units: int, first: int) -> float:
        number = min(units, first)
        taken = self._timed(run, number)  # also sets up what a first run sets up
        if self._over:
            return taken / number
        taken = self._timed(run, number)
        if number < units and not self._over:
            number = min(units, max(number, int(ALLOWANCE * number / taken)))
            taken = self._timed(run, number)
        times = 1
        while times < REPEATS and taken < ALLOWANCE and not self._over:
            taken += self._timed(run, number)
            times += 1
        return taken / (number * times)

    @property
    def _over(self) -> bool:
        return time.perf_counter() - self._begun > ALTOGETHER

    def _timed(self, run: Callable[[int], object], units: int) -> float:
        self._wait()
        start = time.perf_counter()
        run(units)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _ids(self, rows: int, tokens: int) -> Tensor:
        return torch.arange(rows * tokens).view(rows, tokens) % self._vocabulary

    def _hidden(self, rows: int, tokens: int) -> Tensor:
        return torch.ones(rows, tokens, self._geometry.hidden_size, dtype=self._model.dtype, device=self._device)

    def _floats(self, rows: int, columns: int) -> Tensor:
        numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        return numbers.to(self._device)
