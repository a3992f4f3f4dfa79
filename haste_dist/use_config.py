"""Settings of a trained model's use: prediction into a folder, and the service."""

from dataclasses import dataclass

from haste_dist.setting import setting


@dataclass
class PredictConfig:
    rows: int = setting(16384, "texts of a part: what is written, and kept by the next start, at once", low=1, high=2**20)
    batch_size: int = setting(512, "texts embedded and scored at once", low=1, high=8192)
    parts: int = setting(1, "GPUs (or processes on a CPU) that share the labels; all GPUs work, so many of them together", low=1, high=1024)
    label_texts: bool = setting(True, "write what labels are called, too")
    calibrated: bool = setting(True, "scores as haste evaluate --calibrate fitted them, where it did")
    filter: str = setting("", "file of 'row label' lines: labels that a text, counted from 0, is not to get; empty: none")


@dataclass
class ServeConfig:
    host: str = setting("127.0.0.1", "address to listen on; any other than this machine's own is for you to protect with TLS")
    port: int = setting(8000, "port to listen on", low=1, high=65535)
    auth: bool = setting(True, "ask for a bearer token: HASTE_SERVE_TOKEN, else what serve.token_file holds")
    token_file: str = setting("", "file with the token, made where there is none; empty: serve-token in HASTE_CACHE or ~/.cache/haste_dist")
    max_texts: int = setting(64, "texts of a request", low=1, high=4096)
    max_chars: int = setting(20_000, "characters of a text", low=1)
    max_bytes: int = setting(2**20, "bytes of a request", low=64)
    max_k: int = setting(100, "labels a text", low=1, high=1000)
    timeout: float = setting(30.0, "seconds in which a client must have sent its request, and again those in which it is answered", low=0.1)
    waiting: int = setting(256, "requests in work at once; more are told to come back later", low=1)
    batch_size: int = setting(256, "texts of several requests that are computed together", low=1, high=4096)
    batch_wait: float = setting(0.001, "seconds that a request waits for others to join it", low=0.0, high=1.0)
    parts: int = setting(1, "processes, one a GPU, that share the labels", low=1, high=1024)
    reload: float = setting(
        10.0, "seconds between looks for a newer checkpoint, which is loaded beside the old one and takes over (0: never)", low=0.0
    )
