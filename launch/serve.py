"""``haste serve``: the service on this machine's Ray, or on the cluster that the settings name, until a signal ends it."""

import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path

from haste_dist.config import Config
from haste_dist.errors import ConfigError
from haste_dist.use_config import ServeConfig

TOKEN_VARIABLE = "HASTE_SERVE_TOKEN"
LEAST_TOKEN = 16  # characters


def serve_run(config: Config, checkpoint: str) -> int:
    """Serves ``run.folder`` until SIGINT or SIGTERM; returns the exit status. Raises HasteError."""
    from haste_dist.predictor import ModelFiles

    settings = config.serve
    check_port(settings)
    token, told = the_token(settings)
    run = os.path.abspath(config.run.folder)
    ModelFiles(run, checkpoint)  # what is damaged or missing fails here, in one line
    try:
        from ray import serve

        from haste_dist.deployments import NAME, application
        from haste_dist.gate import token_digest
    except ModuleNotFoundError as error:
        raise ConfigError(f"haste serve needs the package {error.name}; pip install 'haste-dist[serve]'") from None
    import ray

    from haste_launch.ray_session import ray_session

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = threading.Event()
    with ray_session(config):
        # After Ray, which sets its own.
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            on_gpu = config.launch.device == "cuda" or (config.launch.device == "auto" and gpus > 0)
            if on_gpu and settings.parts > gpus:
                raise ConfigError(f"serve.parts={settings.parts}: the Ray cluster has {gpus} GPUs, one is needed a part")
            threads = config.launch.threads or max(1, len(os.sched_getaffinity(0)) // settings.parts)
            app = application(run, checkpoint, config, on_gpu, threads, token_digest(token) if token else None)
            quiet = {"log_level": "WARNING", "enable_access_log": False}
            # The proxy's own limit stands behind the gate's, which answers first.
            listen = {"host": settings.host, "port": settings.port, "request_timeout_s": 3 * settings.timeout, "keep_alive_timeout_s": 15}
            serve.start(proxy_location="HeadOnly", http_options=listen, logging_config=quiet)
            serve.run(app, name=NAME, route_prefix="/", logging_config=quiet)
            print(f"serving {config.run.folder} at http://{_shown(settings.host)}:{settings.port}/  {told}", flush=True)
            stop.wait()
        finally:
            serve.shutdown()
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def the_token(settings: ServeConfig) -> tuple[str, str]:
    """The bearer token ("": none is asked for), and what to tell of it. Raises ConfigError."""
    if not settings.auth:
        if not _is_loopback(settings.host):
            print(f"haste: warning: serve.auth=false: whoever reaches {settings.host} may ask", file=sys.stderr)
        return "", "(no token is asked for)"
    given = os.environ.get(TOKEN_VARIABLE, "").strip()
    cache = os.environ.get("HASTE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "haste_dist")
    file = Path(settings.token_file or os.path.join(cache, "serve-token"))
    where = TOKEN_VARIABLE if given else str(file)
    try:
        token = given or (file.read_text(encoding="utf-8").strip() if file.exists() else _make_token(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serve.token_file: {file} cannot be read or made ({error})") from None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where}: a token has at least {LEAST_TOKEN} characters, ASCII without spaces; delete the file to get a new one")
    return token, f"(token in {where})"


def _make_token(file: Path) -> str:
    """A token of 256 random bits, in a file that only its owner can read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_urlsafe(32)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(token + "\n")
    return token


def check_port(settings: ServeConfig) -> None:
    """Raises ConfigError where the address cannot be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        raise ConfigError(
            f"serve.host={settings.host}, serve.port={settings.port}: cannot listen there ({error.strerror or error})"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
