"""The decoder layers of a model one at a time, whether their weights are in memory or on disk.

Whatever walks over the layers (sweep, scoring, repair, evaluation, saving) asks for them here:

    layers = layers_of(model)
    with layers.hold(0, then=1) as layer:   # weights are there now; those of layer 1 will be wanted
        ...

For a model in memory nothing more happens. For one that `open_model` opened, a layer has its weights only while it is
held, and parameters on the meta device else; embeddings, final norm and head are always there. Its own forward works
too, and reads every layer for every batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.files.tensor_file import TensorFile, TensorLayout, write_tensors
from prunus.model.families import family_of
from prunus.model.modules import submodule

__all__ = ["Entries", "LayerState", "Layers", "Part", "StoredLayers", "layers_of", "move_present_", "outside_layers"]

#: a decoder layer's parameters and buffers by their names inside the layer
LayerState = dict[str, Tensor]
#: of some tensors of a layer, by name, the entries along their first dimension that are wanted; others are wanted whole
Entries = Mapping[str, Sequence[int]]
ALL: Entries = {}
#: tensors of a layer, and what was read of each
Sent = Iterable[tuple["Part", LayerState]]
#: where a model keeps its `StoredLayers`
ATTRIBUTE = "_prunus_layers"


@dataclass(frozen=True)
class Part:
    """A tensor of a decoder layer on its way from disk.

    Attributes:
        name: inside the layer.
        read: reads what the files hold of it, to the CPU, in tensors of their own.
        make: makes the tensor of that, wherever it has been sent meanwhile, and empties what it is given; None if the
            layer has no such tensor after all.
        announce: tells the system that it will be read soon.
    """

    name: str
    read: Callable[[], LayerState]
    make: Callable[[LayerState], Tensor | None]
    announce: Callable[[], None]


class Layers:
    """The decoder layers of a model in memory.

    Args:
        modules: the list of decoder layers.
    """

    #: whether weights are on disk
    stored = False

    def __init__(self, modules: Any):
        self.modules = modules

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def hold(self, layer_idx: int, then: int | None = None) -> Iterator[nn.Module]:
        """One layer with its weights, for as long as the context lasts.

        Args:
            layer_idx: which one.
            then: the layer that will be asked for next; one that does not exist is none.
        """
        yield self.modules[layer_idx]

    @property
    def changed(self) -> bool:
        """Whether layers were kept that differ from what their files hold."""
        return False

    def keep(self, layer_idx: int) -> None:
        """Make changes to the weights of a held layer last."""

    def verify(self) -> None:
        """Check that what was read of the model's files is still there."""


class StoredLayers(Layers):
    """Decoder layers whose weights come from disk.

    One layer at a time is in memory, and one tensor of it is read, converted and cut at a time. While it is at work,
    the system is told to have what comes next in its cache. On CUDA the next layer is read and sent meanwhile.

    Args:
        modules: the list of decoder layers, without weights (on the meta device).
        fetch: index of a layer, and the entries that are wanted → its tensors on disk.
        device: where held layers go.
        scratch: folder in which changed layers are kept until the program ends; None for the system's temporary one.
        verify: raises CheckpointError if the files have other content than what was read of them.
        ahead: on CUDA, send the layer that comes next while one is at work, which takes memory for two.
    """

    stored = True

    def __init__(
        self,
        modules: Any,
        fetch: Callable[[int, Entries], Sequence[Part]],
        device: torch.device,
        scratch: Path | None,
        verify: Callable[[], None],
        ahead: bool = True,
    ):
        super().__init__(modules)
        self.scratch = scratch
        self.ahead = ahead
        self._fetch_original = fetch
        self._verify = verify
        self.device = device
        self._empty = [layer.state_dict() for layer in modules]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prunus-layers")
        self._ahead: dict[int, Future[tuple[Sent, Any]]] = {}
        self._announced: Future[None] | None = None
        self._held: set[int] = set()
        self._changed: dict[int, TensorFile] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        # On CUDA, copies run beside the computation on a stream of their own.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for layer_idx, layer in enumerate(modules):
            layer.forward = partial(self._forward, layer_idx)

    def read(self, layer_idx: int) -> LayerState:
        """The state of a layer on its device, with the changes that were kept."""
        sent = self._take(layer_idx)
        return {part.name: made for part, state in sent if (made := part.make(state)) is not None}

    def fetch(self, layer_idx: int, entries: Entries = ALL) -> Sequence[Part]:
        """The tensors of a layer on disk, with the changes that were kept.

        Args:
            layer_idx: which one.
            entries: that are wanted.
        """
        file = self._changed.get(layer_idx)
        if file is None:
            return self._fetch_original(layer_idx, entries)
        return [_part(file, name, entries.get(name)) for name in file.entries]

    @contextmanager
    def hold(self, layer_idx: int, then: int | None = None) -> Iterator[nn.Module]:
        """One layer with its weights; afterwards they are gone."""
        state = self.read(layer_idx)
        if then is not None and 0 <= then < len(self) and then != layer_idx:
            self._prepare(then)
        layer: nn.Module = self.modules[layer_idx]
        self._held.add(layer_idx)
        try:
            layer.load_state_dict(state, assign=True)
            del state
            yield layer
        finally:
            self._held.remove(layer_idx)
            layer.load_state_dict(self._empty[layer_idx], assign=True)

    @property
    def changed(self) -> bool:
        """Whether `keep` was called for a layer."""
        return bool(self._changed)

    def keep(self, layer_idx: int) -> None:
        """Write the held layer to a temporary folder, from which it is read from now on."""
        if self._folder is None:
            if self.scratch is not None:
                self.scratch.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(
                prefix="prunus-layers-", dir=self.scratch, ignore_cleanup_errors=True
            )
        path = Path(self._folder.name) / f"{layer_idx:05d}.safetensors"
        state = self.modules[layer_idx].state_dict()
        write_tensors(path, {name: TensorLayout.of(tensor) for name, tensor in state.items()}, iter(state.items()))
        self._changed[layer_idx] = TensorFile(path)

    def verify(self) -> None:
        """Read again what was read of the model's files, see `StoredWeights.verify`.

        Raises:
            CheckpointError: it is another content.
        """
        self._verify()

    def _forward(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """A layer's own forward, held for as long as it takes where nobody holds it."""
        layer = self.modules[layer_idx]
        with nullcontext() if layer_idx in self._held else self.hold(layer_idx, then=layer_idx + 1):
            return type(layer).forward(layer, *args, **kwargs)

    def _prepare(self, layer_idx: int) -> None:
        """Read ahead the layer that will be needed next.

        This runs in a thread beside the computation, and must be no more than reading: PyTorch starts threads of its
        own for an operation, and those of two threads keep each other from the cores.
        """
        if self._stream is None:
            self._announced = self._reader.submit(self._announce, layer_idx)
        elif self.ahead:
            self._ahead[layer_idx] = self._reader.submit(self._send, layer_idx)

    def _announce(self, layer_idx: int) -> None:
        for part in self.fetch(layer_idx):
            part.announce()

    def _take(self, layer_idx: int) -> Sent:
        """The tensors of a layer as they arrive: on CUDA all at once, else when the one before has been made."""
        if self._announced is not None:
            self._announced.result()  # what went wrong there is said
        if self._stream is None:
            return ((part, _sent(part.read(), self.device)) for part in self.fetch(layer_idx))
        future = self._ahead.pop(layer_idx, None)
        while self._ahead:  # not wanted after all; its memory must be free before more is read
            self._ahead.popitem()[1].cancel()
        if future is None:
            future = self._reader.submit(self._send, layer_idx)
        sent, copied = future.result()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for _, state in sent:
            for tensor in state.values():
                tensor.record_stream(current)
        return sent

    def _send(self, layer_idx: int) -> tuple[Sent, Any]:
        """Read a layer and send it to a CUDA device; also the event of its arrival."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            sent = [(part, _sent(part.read(), self.device, pinned=True)) for part in self.fetch(layer_idx)]
            return sent, self._stream.record_event()


def _sent(state: LayerState, device: torch.device, *, pinned: bool = False) -> LayerState:
    """Tensors on a device, one after another; from pinned memory, without waiting for them to arrive."""
    if pinned:
        return {name: state.pop(name).pin_memory().to(device, non_blocking=True) for name in list(state)}
    return {name: state.pop(name).to(device) for name in list(state)}


def _part(file: TensorFile, name: str, entries: Sequence[int] | None) -> Part:
    """A tensor of a layer that was kept."""
    return Part(
        name,
        lambda: {name: _read(file, name, entries)},
        lambda state: state.pop(name),
        lambda: file.will_need(name, entries),
    )


def _read(file: TensorFile, name: str, entries: Sequence[int] | None) -> Tensor:
    """A tensor of a file, or some entries along its first dimension."""
    if entries is None:
        return file.read(name)
    layout = file.layout(name)
    out = torch.empty((len(entries), *layout.shape[1:]), dtype=layout.dtype)
    for number, entry in enumerate(entries):
        file.read_into(name, out[number], entry)
    return out


def layers_of(model: Any) -> Layers:
    """The decoder layers of a causal language model.

    Raises:
        UnsupportedModelError: the family is not described.
    """
    stored: Layers | None = getattr(model, ATTRIBUTE, None)
    return stored if stored is not None else Layers(submodule(model, family_of(model.config).layers))


def outside_layers(model: Any) -> LayerState:
    """Parameters and persistent buffers of a model outside its decoder layers, by name; tied ones once."""
    prefix = family_of(model.config).layers + "."
    state: LayerState = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(prefix) and not any(tensor is other for other in state.values()):
            state[name] = tensor
    return state


def move_present_(model: nn.Module, device: torch.device) -> None:
    """Move what has values to a device; parameters on the meta device stay there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            store: Any = tensors
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta and tensor.device != device:
                    moved = tensor.detach().to(device)
                    store[name] = nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved
