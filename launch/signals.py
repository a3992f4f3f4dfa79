"""What SIGTERM does in this process: Python lets the main thread alone say so."""

import signal
import threading
from typing import Any


def heed_sigterm(handler: Any) -> Any:
    """Sets what SIGTERM does and returns what it did. None, which stands for a handler that is not Python's, changes nothing."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return signal.getsignal(signal.SIGTERM)
    return signal.signal(signal.SIGTERM, handler)
