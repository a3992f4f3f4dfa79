"""The encoder under DeepSpeed: data-parallel forward, a backward from a given gradient, AdamW, and its state by name.

The output layer computes the gradient of the embeddings itself, so the encoder's loss is a surrogate: the scalar
<x, dx>, whose gradient with respect to x is dx. DeepSpeed sees one flat parameter (flat.py): on a CPU, with an encoder of
six layers so narrow that only the host's work counts, backward and step then take 5.1 ms instead of 10.4.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from haste_dist.config import EncoderConfig
from haste_dist.encoder import Encoder, compile_blocks, fuse_blocks
from haste_dist.errors import CheckpointError
from haste_dist.flat import ClippedAdamW, FlatModule, join_parameters
from haste_dist.graphs import GraphedModule, most_tokens, pads
from haste_dist.imports import no_collection
from haste_dist.meters import encoder_work, stage
from haste_dist.world import World

OTHER = "set encoder.* as the run's config.yaml has it, or name another run.folder"
ADAM_STATE = ("exp_avg", "exp_avg_sq")


class EncoderEngine:
    """An encoder that can be stepped. B padded rows of this rank, S tokens, D width."""

    def __init__(self, encoder: Encoder, config: EncoderConfig, world: World):
        self.config, self.world = config, world
        precision = config.precision if config.precision != "auto" else ("bfloat16" if world.device.type == "cuda" else "float32")
        self.dtype = getattr(torch, precision)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every batch shape: milliseconds a call on the host
        # All of it: transformers hands pretrained models out in eval mode, and ``forward`` looks at the outermost flag alone.
        self.module = encoder.to(world.device).train()
        if config.fused and self.dtype == torch.bfloat16:
            fuse_blocks(encoder)
        if config.compile:
            compile_blocks(encoder)
        if config.frozen:
            self.module.to(self.dtype).requires_grad_(False)
        self.work, self.width = encoder_work(encoder), encoder.width  # before the weights are joined
        self._engine = None
        if config.frozen:
            join_parameters(encoder)
            return
        most = most_tokens(config, encoder)
        self._flat = GraphedModule(encoder, most) if world.device.type == "cuda" and pads(config, most) else FlatModule(encoder)
        # At stage 0 DeepSpeed would step bfloat16 parameters without a float32 copy; stage 1 has one, and the update is the same.
        zero = max(config.zero, int(self.dtype == torch.bfloat16))
        self._engine, self._adamw = _deepspeed_engine(self._flat, config, self.dtype, zero)

    @property
    def trains(self) -> bool:
        return self._engine is not None

    @stage("forward")
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, graph: bool = True) -> Tensor:
        """(B, S) tokens to (B, D) embeddings with dropout; ``graph``: ``backward`` follows. A frozen encoder only embeds. The mask is
        None where it would hide nothing."""
        if self._engine is None:
            return self.embed(input_ids, attention_mask)
        if not self.module.training:  # asked first: setting it visits every module, a millisecond of the host's time
            self._engine.train()
        if graph:
            return self._engine(input_ids, attention_mask)
        with torch.no_grad():
            return self._flat(input_ids, attention_mask)

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, S) tokens to (B, D) embeddings without dropout or graph."""
        self.module.eval()
        return (self.module if self._engine is None else self._flat)(input_ids, attention_mask)

    @stage("backward")
    def backward(self, x_BD: Tensor, dx_BD: Tensor) -> None:
        """Adds the gradient that ``dx_BD``, this rank's part of the one of a global batch, has for the weights."""
        if self._engine is not None:
            # DeepSpeed averages over ranks where the gradient of a batch is the sum of its parts.
            self._engine.backward((x_BD.float() * (dx_BD * self.world.size)).sum())

    @stage("optimizer")
    def step(self, lr: float) -> Tensor | None:
        """Updates the weights by the gradients added since the last update. Returns the norm of that gradient, a scalar on the device:
        where it is not finite, the weights are lost."""
        if self._engine is None:
            return None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return self._adamw.norm

    def forget_recorded(self) -> None:
        """Gives up passes that were recorded for batches of other sizes than those to come, and their memory."""
        graphed = self._graphed()
        if graphed is not None:
            graphed.forget()

    def held_bytes(self) -> int:
        """What this engine holds on the GPU that no allocator counts as in use."""
        graphed = self._graphed()
        return graphed.held_bytes() if graphed is not None else 0

    def peak_bytes(self) -> int:
        """The most bytes of the GPU that this process has used at once, with those; 0 where the allocator's own peak is all."""
        graphed = self._graphed()
        return graphed.peak_bytes() if graphed is not None else 0

    def _graphed(self) -> GraphedModule | None:
        return self._flat if self._engine is not None and isinstance(self._flat, GraphedModule) else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Float32 weights and optimizer state, whole and on the CPU, by name; the same on each rank and at any ZeRO stage.

        Copies of all that trains: the next steps do not change them. Every rank must call it.
        """
        weights = {name: p.detach().float().cpu() for name, p in self.module.named_parameters()}
        if self._engine is None:
            return weights, {}
        part, state = self._master()
        weights |= self._flat.unflatten(self._whole(part))
        if not state:  # no update yet, so no moments either
            return weights, {}
        moments = {f"{key}.{name}": value for key in ADAM_STATE for name, value in self._flat.unflatten(self._whole(state[key]))}
        return weights, {"step": state["step"].reshape(1).float().cpu().clone(), **moments}

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Takes over what ``state`` gave, at this or another number of ranks and ZeRO stage. Raises CheckpointError."""
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        if self._engine is not None:
            shapes |= dict(zip(self._flat.names, self._flat.shapes, strict=True))
        missing = set(shapes) ^ set(weights)
        if missing:
            raise CheckpointError(f"encoder weights do not fit this encoder: '{sorted(missing)[0]}' is in one of them only; {OTHER}")
        for name, shape in shapes.items():
            if shape != weights[name].shape:
                found = f"encoder weight '{name}' has shape {tuple(weights[name].shape)}"
                raise CheckpointError(f"{found}, this encoder needs {tuple(shape)}; {OTHER}")
        with torch.no_grad():
            for name, param in self.module.named_parameters():
                param.copy_(weights[name])
            if self._engine is None:
                return
            part, state = self._master()
            for name, view in self._flat.unflatten(self._flat.flat):
                view.copy_(weights[name])
            part.copy_(self._part_of(weights, part))
            count = moments.get("step", torch.zeros(1))[0]
            if count > 0:
                state["step"] = count.clone().to(part.device)  # where fused AdamW wants it
                for key in ADAM_STATE:
                    state[key] = self._part_of({name: moments[f"{key}.{name}"] for name in self._flat.names}, part).to(part.device)

    def _master(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The flat float32 weights that AdamW updates, whole or this rank's part of them, and its state."""
        [part] = self._adamw.param_groups[0]["params"]
        return part, self._adamw.state[part]

    def _whole(self, part: Tensor) -> Tensor:
        """The parts of all ranks, end to end on the CPU, where ZeRO has cut it."""
        if not self._adamw.partitioned:
            return part.detach().cpu().clone()
        whole = [torch.empty_like(part) for _ in range(self.world.size)]
        dist.all_gather(whole, part.detach())
        return torch.cat(whole).cpu()

    def _part_of(self, named: dict[str, Tensor], part: Tensor) -> Tensor:
        """What of the flat tensor of ``named`` is this rank's ``part``, zeros behind the last number."""
        flat = torch.cat([named[name].float().flatten() for name in self._flat.names])[self._adamw.first :][: part.numel()]
        return torch.nn.functional.pad(flat, (0, part.numel() - flat.numel()))


def _deepspeed_engine(flat: FlatModule, config: EncoderConfig, dtype: torch.dtype, stage: int) -> tuple[Any, ClippedAdamW]:
    device = flat.flat.device.type
    os.environ.setdefault("DS_ACCELERATOR", device)
    with no_collection():
        import deepspeed

    # None of DeepSpeed's own operators is used, so it need not try compilers to learn which it could build. On a CPU it would compile its
    # shared-memory all-reduce at first use (40 s, needs a compiler, hangs on a stale lock), which only inference uses.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    adamw = ClippedAdamW(flat.flat, flat.decayed, config.clip, config.weight_decay, lr=config.lr, betas=(0.9, config.beta2), fused=True)
    zero = {
        "stage": stage,
        "contiguous_gradients": False,  # the flat gradient is contiguous; this would copy it, into a buffer of a GB
        "overlap_comm": False,  # it makes the host wait for the GPU at each backward
    }
    engine, *_ = deepspeed.initialize(
        model=flat,
        optimizer=adamw,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own counters only
            "managed_gradient_accumulation": False,  # an update is where ``step`` is called
            "gradient_clipping": 0.0,  # ClippedAdamW does it
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {**zero, "compute_grad_norm": False} if stage else zero,
            # DeepSpeed's own check would skip a bad step without a word.
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
            "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before each forward pass and after each update
            "steps_per_print": 2**62,
        },
    )
    if stage:
        [part] = adamw.param_groups[0]["params"]
        adamw.first, adamw.partitioned = dist.get_rank() * part.numel(), dist.get_world_size() > 1
    return engine, adamw
