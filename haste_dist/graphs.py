"""An encoder's passes as CUDA graphs: two launches a step in place of several hundred.

A small encoder's step is bound by the host, which launches kernels of a few microseconds one by one. Its passes are recorded once for each
shape of batch, padded so that there are few, and replayed from then on: the same kernels on the same numbers, dropout too, whose masks
follow from the seed that is set before each pass. The first batch of a shape runs as ever, so that rare shapes are never recorded.

Letters: B padded rows of this rank, S tokens, D width, P numbers in the flat parameter.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from haste_dist.config import EncoderConfig
from haste_dist.encoder import Encoder, blocks_to_compile
from haste_dist.flat import FlatModule
from haste_dist.imports import no_collection

# B * S of the largest batches that are recorded: those whose activations, which are held for good, are about as large as BERT-base's
# with LEAST_TOKENS of short texts (5 GiB; twice that in float32); and of large encoders, which keep the GPU busy as they are, LEAST_TOKENS.
LEAST_TOKENS = 2**14
ACTIVATIONS = LEAST_TOKENS * 12 * 768  # B * S * layers * D


def can_replay(config: EncoderConfig, encoder: nn.Module) -> bool:
    """Whether this encoder's passes never ask the GPU for a number, nor for its random state, which recording does not allow."""
    compiled = config.compile and blocks_to_compile(encoder)
    return config.graphs and not compiled and not config.checkpointing and bool(getattr(encoder, "whole_mask", False))


def most_tokens(config: EncoderConfig, encoder: Encoder) -> int:
    """B * S of the largest batches whose passes are recorded; 0 where none is."""
    if not can_replay(config, encoder):
        return 0
    model: Any = encoder.model.config
    return max(LEAST_TOKENS, ACTIVATIONS // (model.num_hidden_layers * model.hidden_size))


def pads(config: EncoderConfig, most: int) -> bool:
    """Whether training on a GPU pads batches to few lengths: for passes of up to ``most`` tokens are recorded, or cuDNN plans for each."""
    return not config.frozen and (most > 0 or config.attention == "cudnn")


def padded_length(tokens: int, longest: int) -> int:
    """S that batches of ``tokens`` tokens are padded to: multiples of 8, of 32 above 128, or the ``longest`` there is."""
    step = 8 if tokens <= 128 else 32
    return min(-(-tokens // step) * step, max(tokens, longest))


@dataclass
class Recorded:
    """Both passes of one shape, and the tensors that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    ids_BS: Tensor
    mask_BS: Tensor
    x_BD: Tensor
    dx_BD: Tensor


class GraphedModule(FlatModule):
    """A FlatModule on a GPU whose ``forward(input_ids (B, S), attention_mask (B, S) or None)`` pads batches, and replays those of
    up to ``most`` tokens.

    A replayed forward pass must be followed by its backward pass before the next one: all shapes share their activations' memory.
    """

    def __init__(self, module: Encoder, most: int):
        super().__init__(module)
        config: Any = module.model.config
        self._longest, self._pad_id = getattr(config, "max_position_embeddings", 0), config.pad_token_id or 0
        self._most = most  # 0: none is recorded
        # Of a shape that was seen once, None.
        self._recorded: dict[tuple[int, int, int], Recorded | None] = {}
        self._pool: Any = None
        self._largest = 0  # B * S recorded in this pool
        self._gradient_P: Tensor | None = None
        self._peak = 0  # bytes, up to the last recording
        self.replays = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:  # type: ignore[override]
        if not self.module.training:
            return super().forward(input_ids, attention_mask)
        rows, tokens = input_ids.shape
        length = padded_length(tokens, self._longest)
        small = rows * length <= self._most
        if attention_mask is None and (small or tokens < length):  # one recording serves full batches and others
            attention_mask = torch.ones_like(input_ids)
        shape = (rows, length, self.flat.data_ptr())  # recorded kernels know the weights by their address
        one = self._recorded.get(shape)
        if one is None and small and torch.is_grad_enabled():
            one = self._try_to_record(rows, length) if shape in self._recorded else None
            self._recorded[shape] = one
        if one is None or not torch.is_grad_enabled():
            if attention_mask is not None and tokens < length:
                padding = (0, length - tokens)
                input_ids, attention_mask = F.pad(input_ids, padding, value=self._pad_id), F.pad(attention_mask, padding)
            return super().forward(input_ids, attention_mask)
        assert attention_mask is not None
        for fixed, given, pad in ((one.ids_BS, input_ids, self._pad_id), (one.mask_BS, attention_mask, 0)):
            fixed[:, :tokens].copy_(given)
            if tokens < length:
                fixed[:, tokens:] = pad
        return _Replay.apply(self.flat, self, one)

    def held_bytes(self) -> int:
        """What recorded passes hold for good and no other work can take: their activations."""
        if self._pool is None:
            return 0
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    def peak_bytes(self) -> int:
        """The most bytes of the GPU that were in use at once since the module was made, or the allocator's peak was last set back."""
        return max(self._peak, torch.cuda.max_memory_allocated(self.flat.device) + self.held_bytes())

    def gradient(self) -> Tensor:
        """(P,) of the backward pass replayed last, in memory of its own: gradients of further batches may be added to it."""
        assert self._gradient_P is not None
        return self._gradient_P.clone()

    def _try_to_record(self, rows: int, length: int) -> Recorded | None:
        """None, and a warning, for a model that does in its passes what recording does not allow; it is not tried again. Where memory does
        not suffice, nothing as large is."""
        device = self.flat.device
        try:
            with no_collection(), _same_stream(device):
                return self._record(rows, length)
        except RuntimeError as error:  # CUDA's errors too
            full = any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__))
            self._most = rows * length - 1 if full else 0
            with no_collection():
                _end_recording(device, self._pool)
            if not any(self._recorded.values()):
                self.forget()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            how = "in batches of this size" if full else "and are launched as ever, more slowly"
            warnings.warn(f"the encoder's passes cannot be recorded {how} ({reason})", stacklevel=2)
            return None

    def forget(self) -> None:
        """Gives up what is recorded, and its memory."""
        self._recorded, self._pool, self._largest, self._gradient_P = {}, None, 0, None

    def _record(self, rows: int, length: int) -> Recorded:
        """Records both passes; leaves the random state as it was. Other threads may use the GPU meanwhile. What is garbage by now must not
        be collected: freeing it may be what a recording does not allow."""
        device = self.flat.device
        self._peak = self.peak_bytes()
        if rows * length > self._largest:  # recorded first, it leaves room in which all smaller ones fit; what is recorded starts anew
            torch.cuda.synchronize()
            self._recorded = dict.fromkeys(self._recorded)
            self._pool, self._largest = torch.cuda.graph_pool_handle(), rows * length
        if self._gradient_P is None:
            self._gradient_P = torch.empty_like(self.flat)
        ids_BS = torch.zeros(rows, length, dtype=torch.int64, device=device)
        mask_BS = torch.ones_like(ids_BS)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how: Any = {"pool": self._pool, "capture_error_mode": "thread_local"}
        # A leaf of its own: the parameter's gradient node belongs to the stream that DeepSpeed's hooks were made on.
        flat_P = self.flat.detach().requires_grad_()
        with torch.random.fork_rng(devices=[device]):
            with torch.cuda.graph(forward, **how):
                self.bind(flat_P)
                x_BD = self.module(ids_BS, mask_BS)
            dx_BD = torch.zeros_like(x_BD)
            with torch.cuda.graph(backward, **how):
                [gradient_P] = torch.autograd.grad(x_BD, [flat_P], dx_BD)
                self._gradient_P.copy_(gradient_P)
        # While it recorded, the allocator counted what ``held_bytes`` counts from now on.
        torch.cuda.reset_peak_memory_stats(device)
        return Recorded(forward, backward, ids_BS, mask_BS, x_BD.detach(), dx_BD)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat_P: Tensor, module: GraphedModule, one: Recorded) -> Tensor:  # type: ignore[override]
        one.forward.replay()
        module.replays += 1
        ctx.module, ctx.one, ctx.number = module, one, module.replays
        return one.x_BD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_BD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.number != ctx.module.replays:
            raise RuntimeError("a later forward pass has taken the memory of this one's activations")
        ctx.one.dx_BD.copy_(dx_BD)
        ctx.one.backward.replay()
        return ctx.module.gradient(), None, None


def _same_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Behind it work is launched where it was before; a recording that fails leaves another stream."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()


def _end_recording(device: torch.device, pool: Any) -> None:
    """What a recording that failed leaves undone: memory still comes from its ``pool``, which is never given back, and torch's generator
    waits for its end, so that dropout would fail; one of nothing ends that."""
    with suppress(RuntimeError, AttributeError, TypeError):  # given back only if it was still in use
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with suppress(RuntimeError):  # memory may be full
        nothing = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            nothing.zero_()
