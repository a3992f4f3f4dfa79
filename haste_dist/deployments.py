"""The service on Ray Serve: a front that speaks HTTP, the model behind it, and one more process for each further share of the labels.

    front (ASGI: gate, service, batches) -> model (encoder, first share of the labels) -> label parts 1 .. parts - 1

Serve restarts a process that dies, and holds requests meanwhile. Needs the extra haste-dist[serve].
"""

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from haste_dist.batching import Batcher
from haste_dist.config import Config
from haste_dist.gate import App
from haste_dist.live_model import Current, Found, LabelPart, LiveModel, asked_for, merged, told
from haste_dist.service import build_service
from haste_dist.use_config import ServeConfig

Item = tuple[list[str], int, int]  # texts, k, neighbours
NAME = "haste"
# Serve's threads of their own for a process's code and for its calls to others are for code that blocks: here, two hand-overs a request.
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


class Front:
    """One process that answers all clients, and sends the model's process a batch of their requests at a time."""

    def __init__(self, settings: ServeConfig, digest: bytes | None, model: DeploymentHandle):
        self.settings, self.digest, self.model = settings, digest, model

    def __serve_build_asgi_app__(self) -> App:
        async def answer(items: list[Item]) -> list[dict[str, Any]]:
            return await self.model.answer.remote(items)

        settings = self.settings
        batcher = Batcher(answer, most_texts(settings), settings.batch_wait, lambda item: len(item[0]))

        async def ask(texts: list[str], k: int, neighbours: int) -> dict[str, Any]:
            return await batcher((texts, k, neighbours))

        async def ready() -> dict[str, Any]:
            return await self.model.state.remote()

        return build_service(settings, ask, ready, self.digest)


class Part:
    """Labels of one of several processes."""

    def __init__(self, run: str, checkpoint: str, device: str, threads: int, settings: ServeConfig, part: int):
        _use_threads(threads)
        self.labels = LabelPart(run, part, settings.parts, device)
        self.labels.warm(checkpoint, most_texts(settings))

    async def hold(self, versions: list[str]) -> None:
        await asyncio.to_thread(self.labels.hold, versions)

    async def topk(self, version: str, x_ND: Any, k: int) -> Found:
        return await asyncio.to_thread(self.labels.topk, version, x_ND, k)


class Model:
    """Answers a batch of requests at a time, and follows the run's checkpoints."""

    def __init__(self, run: str, checkpoint: str, device: str, threads: int, settings: ServeConfig, *others: DeploymentHandle):
        _use_threads(threads)
        self.live = LiveModel(run, checkpoint, device, settings.parts)
        self.live.warm(most_texts(settings))
        self.others, self.settings = others, settings
        self.one_at_a_time = asyncio.Lock()
        self.following = asyncio.get_running_loop().create_task(self._follow()) if settings.reload else None

    async def state(self) -> dict[str, Any]:
        live = self.live
        version, labels = live.current.files.version, live.current.files.order.labels
        return {"model": version, "labels": labels, "reloads": live.reloads, "reload_error": live.reload_error}

    async def answer(self, items: list[Item]) -> list[dict[str, Any]]:
        async with self.one_at_a_time:
            model = self.live.current
            found = await self._find(model, [text for texts, _, _ in items for text in texts], asked_for(max(k for _, k, _ in items)))
        counts = [(len(texts), k, neighbours) for texts, k, neighbours in items]
        answers = self.live.answers(model, found, counts)
        version, step, batch = model.files.version, model.step, sum(texts for texts, _, _ in counts)
        return [{"model": version, "predictions": one, "batch": batch, "step": step} for one in answers]

    async def _find(self, model: Current, texts: list[str], k: int) -> Found:
        x_ND = await asyncio.to_thread(self.live.embed, model, texts)
        if not self.others:
            return await asyncio.to_thread(self.live.topk, model, x_ND, k)
        sent = x_ND.float().cpu().numpy()
        asked = [other.topk.remote(model.files.version, sent, k) for other in self.others]
        mine = await asyncio.to_thread(self.live.topk, model, x_ND, k)
        return merged([mine, *(await asyncio.gather(*asked))], k)

    async def _follow(self) -> None:
        """Nothing that goes wrong may end this, since nobody would notice that checkpoints are followed no more."""
        replaced = False
        while True:
            await asyncio.sleep(self.settings.reload)
            replaced |= await self.live.follow(asyncio.to_thread, self._hold)
            if replaced:
                try:
                    async with self.one_at_a_time:  # the batch that began with the old version is done
                        await self._hold([self.live.current.files.version])
                    replaced = False
                except Exception as error:
                    self.live.reload_error = told(error, f"{self.live.folder}: an older checkpoint could not be let go of")
            if self.live.reload_error:
                logging.getLogger("ray.serve").warning(self.live.reload_error)

    async def _hold(self, versions: list[str]) -> None:
        await asyncio.gather(*(other.hold.remote(versions) for other in self.others))


def application(run: str, checkpoint: str, config: Config, on_gpu: bool, threads: int, digest: bytes | None) -> Application:
    """What ``serve.run`` takes. ``run``: an absolute path that every node can read."""
    settings, device = config.serve, "cuda" if on_gpu else "cpu"
    most = max(2 * settings.waiting, 1000)  # the gate says no, so that it is said in one way

    def deploy(kind: type, name: str, resources: dict[str, float]) -> Any:
        actor = {**resources, "runtime_env": {"env_vars": ONE_LOOP}}
        return serve.deployment(kind, name=name, ray_actor_options=actor, max_ongoing_requests=most, health_check_timeout_s=120)

    heavy = {"num_gpus": 1.0, "num_cpus": 0.0} if on_gpu else {"num_cpus": 0.0}
    same = (run, checkpoint, device, threads, settings)
    others = [deploy(Part, f"labels-{i}", heavy).bind(*same, i) for i in range(1, settings.parts)]
    model = deploy(Model, "model", heavy).bind(*same, *others)
    return deploy(serve.ingress()(Front), "front", {"num_cpus": 0.0}).bind(settings, digest, model)


def most_texts(settings: ServeConfig) -> int:
    """Of a batch: a request is never divided."""
    return max(settings.batch_size, settings.max_texts)


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
