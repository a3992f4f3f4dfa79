"""The encoder under DeepSpeed: data-parallel forward, a backward from a given gradient, AdamW, and its state by name.

The output layer computes the gradient of the embeddings itself, so the encoder's loss is a surrogate: the scalar
<x, dx>, whose gradient with respect to x is dx.
"""

import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from haste_dist.config import EncoderConfig
from haste_dist.encoder import Encoder
from haste_dist.errors import CheckpointError
from haste_dist.meters import stage
from haste_dist.world import World

ADAM_STATE = ("exp_avg", "exp_avg_sq")


class EncoderEngine:
    """An encoder that can be stepped. B padded rows of this rank, S tokens, D width."""

    def __init__(self, encoder: Encoder, config: EncoderConfig, world: World, rows: int, accumulation: int = 1):
        """``rows``: padded batch rows of one rank; ``accumulation``: backward passes an update."""
        self.config, self.world = config, world
        precision = config.precision if config.precision != "auto" else ("bfloat16" if world.device.type == "cuda" else "float32")
        self.dtype = getattr(torch, precision)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every batch shape: milliseconds a call on the host
        self.module = encoder.to(world.device)
        self.width = encoder.width
        self._engine = None
        if config.frozen:
            self.module.to(self.dtype).requires_grad_(False)
        else:
            self._engine = _deepspeed_engine(encoder, config, self.dtype, rows, accumulation)

    @stage("forward")
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) tokens to (B, D) embeddings, with a graph for ``backward`` unless the encoder is frozen."""
        if self._engine is None:
            return self.embed(input_ids, attention_mask)
        if not self.module.training:  # asked first: setting it visits every module, a millisecond of the host's time
            self._engine.train()
        return self._engine(input_ids, attention_mask)

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) tokens to (B, D) embeddings without dropout or graph."""
        self.module.eval()
        return self.module(input_ids, attention_mask)

    @stage("backward")
    def backward(self, x_BD: Tensor, dx_BD: Tensor) -> None:
        """Adds the gradient of the mean over this update's micro-batches; ``dx_BD`` is this rank's part of one global batch."""
        if self._engine is not None:
            # DeepSpeed averages over ranks where the gradient of a batch is the sum of its parts.
            self._engine.backward((x_BD.float() * (dx_BD * self.world.size)).sum())

    @stage("optimizer")
    def step(self, lr: float) -> bool:
        """Updates the weights, if this micro-batch ends an accumulation. False if the gradient was not finite: the weights are lost."""
        if self._engine is None:
            return True
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        plain = [p.grad for p in self.module.parameters() if p.grad is not None]  # stage 0 only: ZeRO keeps its own
        norm = nn.utils.get_total_norm(plain) if plain else None
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()  # a number that the step made anyway; -1 where it was not finite
        return norm is None or 0 <= float(norm) < math.inf

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Float32 weights and optimizer state, whole and on the CPU, by name; the same on each rank and at any ZeRO stage.

        Every rank must call it.
        """
        if self._engine is None:
            return {name: p.detach().float().cpu() for name, p in self.module.named_parameters()}, {}
        parameters = list(self._parameters())
        count = torch.tensor([max(float(state.get("step", 0)) for *_, state in parameters)])
        if self.world.size > 1:
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.world.control)
        weights = {name: _whole(param, flat).cpu() for name, param, flat, _ in parameters}
        if count == 0:  # no update yet, so no moments either
            return weights, {}
        moments = {f"{key}.{name}": _whole(param, state[key]).cpu() for name, param, _, state in parameters for key in ADAM_STATE}
        return weights, {"step": count, **moments}

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Takes over what ``state`` gave, at this or another number of ranks and ZeRO stage. Raises CheckpointError."""
        missing = {name for name, _ in self.module.named_parameters()} ^ set(weights)
        if missing:
            raise CheckpointError(f"encoder weights do not fit this encoder: '{sorted(missing)[0]}' is in one of them only")
        for name, param in self.module.named_parameters():
            if param.shape != weights[name].shape:
                raise CheckpointError(
                    f"encoder weight '{name}' has shape {tuple(weights[name].shape)}, this encoder needs {tuple(param.shape)}"
                )
            with torch.no_grad():
                param.copy_(weights[name])
        if self._engine is None:
            return
        count = moments.get("step", torch.zeros(1))[0]
        for name, param, flat, state in self._parameters():
            _copy_part(param, flat, weights[name])
            if count > 0:
                state["step"] = count.clone().to(flat.device)  # where fused AdamW wants it
                for key in ADAM_STATE:
                    if key not in state:
                        state[key] = torch.zeros_like(flat)
                    _copy_part(param, state[key], moments[f"{key}.{name}"])

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor, dict]]:
        """(name, parameter, float32 tensor that the optimizer updates, its optimizer state), the latter two perhaps a flat
        partition of many parameters (ZeRO, or bfloat16 with float32 master weights)."""
        optimizer = self._engine.optimizer  # type: ignore[union-attr]
        inner = getattr(optimizer, "optimizer", optimizer)
        for name, param in self.module.named_parameters():
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:
                flat = inner.param_groups[mapping.param_group_index]["params"][0]
            elif hasattr(param, "_hp_mapping"):  # partitioned, and this rank owns no part of it
                flat = param.new_empty(0, dtype=torch.float32)
            else:
                flat = param
            yield name, param, flat, inner.state[flat] if flat.numel() else dict.fromkeys(ADAM_STATE, flat)


def _deepspeed_engine(encoder: Encoder, config: EncoderConfig, dtype: torch.dtype, rows: int, accumulation: int) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", next(encoder.parameters()).device.type)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # On a CPU DeepSpeed would compile its shared-memory all-reduce at first use (40 s, needs a compiler, hangs on a stale
    # lock). Only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    decayed = [p for p in encoder.parameters() if p.ndim > 1]
    plain = [p for p in encoder.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = next(encoder.parameters()).device.type == "cuda"
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=fused)
    engine, *_ = deepspeed.initialize(
        model=encoder,
        optimizer=adamw,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.clip,  # DeepSpeed's own default is 1.0, so it is always set
            # At stage 0 DeepSpeed would step bfloat16 parameters one by one; stage 1 on its flat float32 copy is the same update.
            "zero_optimization": {"stage": max(config.zero, int(dtype == torch.bfloat16))},
            # DeepSpeed's own check looks at each parameter (206 calls of isfinite a step for MiniLM) and skips such a step without a
            # word; ``step`` looks at the norm instead and tells.
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
            "steps_per_print": 2**62,
        },
    )
    return engine


def _whole(param: nn.Parameter, flat: Tensor) -> Tensor:
    """The (param.shape) float32 value of which ``flat`` holds this rank's part."""
    if not hasattr(param, "_hp_mapping"):
        return flat.detach().float().clone()
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    mapping = param._hp_mapping
    if mapping is not None:
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        whole[low.start : low.start + low.numel] = flat.detach().flatten()[high.start : high.start + high.numel].float()
    if dist.get_world_size() > 1:
        dist.all_reduce(whole)
    return whole.view(param.shape)


@torch.no_grad()
def _copy_part(param: nn.Parameter, flat: Tensor, whole: Tensor) -> None:
    """Writes this rank's part of ``whole`` into ``flat``."""
    if not hasattr(param, "_hp_mapping"):
        flat.copy_(whole)
        return
    mapping = param._hp_mapping
    if mapping is not None:
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat.view(-1)[high.start : high.start + high.numel].copy_(whole.flatten()[low.start : low.start + low.numel])
